"""Texts in a file too large for memory: surveyed once, then read part by part.

A .jsonl file holds {"text": …} a line, any other file a text a line; blank lines are no texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError
from .progress import progress_bar
from .prompts import check_text


@dataclass(frozen=True)
class Part:
    """Texts that stand together in a file.

    Attributes:
        first: Number of the first text in the whole file, from 0.
        rows: How many texts.
        offset: The byte at which the first one's line begins.
        line: That line's number, from 1.
    """

    first: int
    rows: int
    offset: int
    line: int


@dataclass(frozen=True)
class Corpus:
    """What is known of a file of texts: its size in bytes, its sha256, and its parts in order."""

    size: int
    sha256: str
    rows: int
    parts: tuple[Part, ...]


def survey(path: Path, part_rows: int, part_bytes: int, *, progress: bool = False) -> Corpus:
    """Check every line of a file, and cut it into parts.

    Args:
        path: The file.
        part_rows: Texts of a part at most.
        part_bytes: A part ends with the line that reaches this size.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        InputError: The file is missing or holds no text, or a line is not one; names the line.
    """
    digest = hashlib.sha256()
    parts: list[Part] = []
    rows = size = 0
    start: Part | None = None
    try:
        total = path.stat().st_size
        with progress_bar("Reading", total, enabled=progress) as advance:
            for number, offset, line in _lines(path, 0, 1):
                digest.update(line)
                size += len(line)
                advance(len(line))
                if parse_text(path, number, line) is None:
                    continue
                start = start or Part(rows, 0, offset, number)
                rows += 1
                if rows - start.first == part_rows or size - start.offset >= part_bytes:
                    parts.append(Part(start.first, rows - start.first, start.offset, start.line))
                    start = None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if start is not None:
        parts.append(Part(start.first, rows - start.first, start.offset, start.line))
    if not parts:
        raise InputError(f"{path} holds no text")
    return Corpus(size, digest.hexdigest(), rows, tuple(parts))


def read_part(path: Path, part: Part) -> list[str]:
    """The texts of a part.

    Raises:
        InputError: The file is no longer what was surveyed.
    """
    texts: list[str] = []
    try:
        for number, _, line in _lines(path, part.offset, part.line):
            text = parse_text(path, number, line)
            if text is not None:
                texts.append(text)
            if len(texts) == part.rows:
                return texts
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    raise InputError(
        f"{path} should hold {part.rows:,} texts from line {part.line:,} on, found {len(texts):,}: "
        "it has changed meanwhile"
    )


def parse_text(path: Path, number: int, line: bytes) -> str | None:
    """The text of a line; None where it is blank.

    Raises:
        InputError: It is not valid, or names a prompt of its own.
    """
    try:
        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        if not text.strip():
            return None
        if path.suffix != ".jsonl":
            return text
        row = json.loads(text)
        text, prompt = row["text"], row.get("prompt", "document")
        check_text(number, text)
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(
            f'{path}:{number} should be UTF-8 text, in a .jsonl file {{"text": …}}; found '
            f"{line[:80]!r} ({error})"
        ) from error
    if prompt != "document":
        raise InputError(
            f"{path}:{number} names a prompt of its own; here one prompt is for all: take it out, "
            "and give --prompt"
        )
    return text


def _lines(path: Path, offset: int, number: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line from one on."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            yield number, offset, line
            number += 1
            offset += len(line)
