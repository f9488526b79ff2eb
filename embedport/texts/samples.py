"""Texts and pairs: the built-in ones, and the user's own from .txt and .jsonl files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..files import MOST_TEXT, read_small
from ..strict_json import parse_json
from .corpus import describe_fault, is_jsonl, note_blank_lines, titled_text

T = TypeVar("T")
# Minimum and maximum characters of a short text.
SHORT = (20, 200)
# What a line must hold.
TEXTS = ("text", "query", "document")


@dataclass(frozen=True)
class Sample:
    """A text and its prompt.

    Attributes:
        text: The text.
        prompt: A prompt's name, "query", "document" or a literal prompt; None for the model's
            default prompt.
    """

    text: str
    prompt: str | None = "document"


@dataclass(frozen=True)
class Pair:
    """A query and a document for a reranker to score.

    Attributes:
        query: The query.
        document: The document.
        instruction: The criterion of relevance; None for the model's own.
    """

    query: str
    document: str
    instruction: str | None = None


def builtin_samples() -> list[Sample]:
    """The built-in texts: queries, passages and code in several languages, 1 to 700 words."""
    rows = _builtin("texts.jsonl")
    return [Sample(row["text"], "query" if row["kind"] == "query" else "document") for row in rows]


def prompted_samples(prompts: Iterable[str]) -> list[Sample]:
    """A few short built-in texts for each prompt of a model, the default one included.

    "query" and "document" are left out because `builtin_samples` covers them.

    Args:
        prompts: The names of a model's prompts.
    """
    short = [row.text for row in builtin_samples() if SHORT[0] <= len(row.text) <= SHORT[1]]
    names = [None, *sorted(set(prompts) - {"query", "document"})]
    return [Sample(text, name) for i, name in enumerate(names) for text in short[i % 4 :: 4][:3]]


def builtin_pairs() -> list[Pair]:
    """The built-in pairs: six queries with six documents each, of mixed relevance."""
    return [Pair(row["query"], row["document"]) for row in _builtin("pairs.jsonl")]


def _builtin(name: str) -> list[dict[str, Any]]:
    text = (files("embedport") / "demo" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_samples(path: str | Path, prompt: str | None = "document") -> list[Sample]:
    """Read texts: lines of a .txt file, or {"text": …, "prompt": …} lines of a .jsonl file.

    A "title" goes before the text. A null "prompt" means the model's default prompt.

    Args:
        path: The file.
        prompt: The prompt of texts without one.

    Raises:
        InputError: The file is missing, empty, has another suffix, or a line is invalid; names the
            line.
    """
    path = Path(path)
    if is_jsonl(path):
        return _read_jsonl(path, lambda row: Sample(titled_text(row), row.get("prompt", prompt)))
    lines = _nonempty(path, _lines(path))
    note_blank_lines(path, len(lines), lines[-1][0])
    return [Sample(line, prompt) for _, line in lines]


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs: {"query": …, "document": …, "instruction": …} lines of a .jsonl file.

    Without "instruction", or with null, the model's own is meant.

    Raises:
        InputError: The file is missing, empty or malformed; names the line.
    """
    return _read_jsonl(
        Path(path), lambda row: Pair(row["query"], row["document"], row.get("instruction"))
    )


def _read_jsonl(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    rows = []
    for number, line in _lines(path):
        try:
            row = make(parse_json(line))
            # None: the model's default prompt or instruction.
            values = [
                value for name, value in vars(row).items() if name in TEXTS or value is not None
            ]
            if not all(isinstance(value, str) for value in values):
                raise TypeError("a value is not a string")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{path}:{number} should be an object like {{"text": …}} or {{"query": …, '
                f'"document": …}}, found {line[:80]!r} ({describe_fault(error)})'
            ) from error
        rows.append(row)
    return _nonempty(path, rows)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    try:
        # A shell's <(command) is a FIFO.
        data = path.read_bytes() if path.is_fifo() else read_small(path, MOST_TEXT)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    # Not splitlines(): a text may contain U+2028 and other line separators.
    lines = text.replace("\r\n", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _nonempty(path: Path, rows: list[T]) -> list[T]:
    if not rows:
        raise InputError(f"{path} holds no text")
    return rows
