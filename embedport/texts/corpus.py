"""A text file that may be larger than memory: checked once, then read part by part.

A .jsonl file holds one {"text": …} per line; an optional "title" goes before the text, and an
optional "_id" or "id" names it. A .txt file holds one text per line. Blank lines are skipped.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

from ..errors import InputError
from ..progress import progress_bar
from ..storage import Place, open_to_read
from ..strict_json import parse_json
from .prompts import check_text

logger = logging.getLogger(__name__)

# Maximum bytes of a line; the longest text that a model reads has 200,000.
LONGEST_LINE = 64 << 20


@dataclass(frozen=True)
class Row:
    """A text of a corpus.

    Attributes:
        id: The file's own id, or the number of the text.
        text: The text, after its title.
        prompt: A prompt's name, "query", "document" or a literal prompt; None for the model's
            default prompt.
    """

    id: str
    text: str
    prompt: str | None = "document"


@dataclass(frozen=True)
class Part:
    """A run of consecutive texts in a file.

    Attributes:
        first: Index of its first text in the file, from 0.
        rows: Number of texts.
        offset: Byte offset of the first text's line; in Parquet the row group.
        line: That line's number, from 1; in Parquet the row in its group, from 0.
        crc32: Checksum of the bytes from `offset` to the end of the last text's line; in Parquet of
            the texts.
    """

    first: int
    rows: int
    offset: int
    line: int
    crc32: int


@dataclass(frozen=True)
class Corpus:
    """A text file: its size in bytes, sha256, number of texts, and parts in order."""

    size: int
    sha256: str
    rows: int
    parts: tuple[Part, ...]


def survey(
    path: Place,
    part_rows: int,
    part_bytes: int,
    *,
    prompt: str | None = "document",
    progress: bool = False,
) -> Corpus:
    """Check every line of a file, and cut it into parts.

    Args:
        path: The file.
        part_rows: Maximum texts per part.
        part_bytes: A part ends with the line that reaches this size.
        prompt: The prompt of all texts; a line may name no other.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        InputError: The file is missing, holds no text, has another suffix, or a line is invalid;
            names the line.
    """
    is_jsonl(path)
    digest = hashlib.sha256()
    parts: list[Part] = []
    rows = size = crc = last = 0
    open_part: Part | None = None
    with (
        _open(path) as file,
        progress_bar("Reading", file.seek(0, 2), enabled=progress) as advance,
    ):
        for number, offset, line in _lines(path, file):
            digest.update(line)
            size += len(line)
            advance(len(line))
            crc = zlib.crc32(line, crc) if open_part else zlib.crc32(line)
            row = _parse(path, number, line, "", prompt)
            if row is None:
                continue
            check_prompt(f"{path}:{number}", row.prompt, prompt)
            open_part = open_part or Part(rows, 0, offset, number, 0)
            open_part = replace(open_part, rows=open_part.rows + 1, crc32=crc)
            rows, last = rows + 1, number
            if open_part.rows == part_rows or size - open_part.offset >= part_bytes:
                parts.append(open_part)
                open_part = None
    if open_part is not None:
        parts.append(open_part)
    if not parts:
        raise InputError(f"{path} holds no text")
    if not is_jsonl(path):
        note_blank_lines(path, rows, last)
    return Corpus(size, digest.hexdigest(), rows, tuple(parts))


def read_part(path: Place, part: Part) -> list[Row]:
    """Read the texts of a part, with their ids.

    Raises:
        InputError: The file has changed since the survey.
    """
    rows: list[Row] = []
    crc = 0
    with _open(path) as file:
        for number, _, line in _lines(path, file, part.offset, part.line):
            crc = zlib.crc32(line, crc)
            row = _parse(path, number, line, str(part.first + len(rows)))
            if row is not None:
                rows.append(row)
            if len(rows) == part.rows:
                break
    if len(rows) < part.rows or crc != part.crc32:
        raise InputError(
            f"{path} should hold the same {part.rows:,} texts from line {part.line:,} on as when "
            f"the work began, found others: the file has changed"
        )
    return rows


def stream_rows(path: Place, *, progress: bool = False) -> Iterator[Row]:
    """Read every text of a file once, with the prompts that lines name.

    Args:
        path: The file.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        InputError: The file is missing, has another suffix, or a line is invalid; names the line.
    """
    is_jsonl(path)
    with (
        _open(path) as file,
        progress_bar("Reading", file.seek(0, 2), enabled=progress) as advance,
    ):
        for number, _, line in _lines(path, file):
            row = _parse(path, number, line, str(number))
            if row is not None:
                yield row
            advance(len(line))


def note_blank_lines(place: object, texts: int, last: int) -> None:
    """Warn of blank lines among texts that are a line each: results are numbered without them.

    Args:
        place: The file, for the message.
        texts: The number of texts.
        last: The number of the line of the last text, from 1.
    """
    if last > texts:
        logger.warning(
            "%s: %s of %s lines are blank and left out: results are numbered without them",
            place,
            f"{last - texts:,}",
            f"{last:,}",
        )


def check_prompt(place: str, named: str | None, prompt: str | None) -> None:
    """Check the prompt that a text of a file names, where all texts get one.

    Args:
        place: The text's place, for messages.
        named: What it names; `prompt` if it names none.
        prompt: The prompt of all texts; None for the model's default prompt.

    Raises:
        InputError: They differ.
    """
    if named != prompt:
        raise InputError(
            f"{place} names its own prompt, {named!r}, but all texts get the same one here: take "
            "it out, or give it as `prompt`"
        )


def _parse(
    path: Place, number: int, line: bytes, name: str, prompt: str | None = "document"
) -> Row | None:
    """The text of a line, None if it is blank; `name` and `prompt` are of a line without them."""
    try:
        # Editors on Windows begin a file with a byte order mark.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        text = text.removesuffix("\n").removesuffix("\r")
        if not text.strip():
            return None
        if not is_jsonl(path):
            return Row(name, text, prompt)
        row = parse_json(text)
        text, prompt = titled_text(row), row.get("prompt", prompt)
        check_text(number, text)
        if prompt is not None:
            check_text(number, prompt)
        name = row_id(row, name)
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(
            f'{path}:{number} should be UTF-8 text, in a .jsonl file {{"text": …}}; found '
            f"{line[:80]!r} ({describe_fault(error)})"
        ) from error
    return Row(name, text, prompt)


def is_jsonl(path: Place) -> bool:
    """Whether a text file holds JSON objects (.jsonl) rather than plain lines (.txt).

    Raises:
        InputError: It has another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".txt", ""):  # a pipe has none
        raise InputError(
            f'{path} should be .txt, one text per line, or .jsonl, one {{"text": …}} per line (or '
            f".parquet, for `encode` and `rerank`), found {path.suffix}"
        )
    return suffix == ".jsonl"


def describe_fault(error: Exception) -> str:
    """Why a line of a .jsonl file is invalid: an error's text, but for those that do not say it."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "it is not an object" if isinstance(error, AttributeError) else str(error)


def titled_text(row: Mapping[str, Any]) -> Any:
    """The "text" of a row, after its "title" if it has one, as BEIR defines a document."""
    title, text = row.get("title"), row["text"]
    if not title or not isinstance(text, str):
        return text
    if not isinstance(title, str):
        raise TypeError(f"its title should be a text, found {title!r:.80}")
    return f"{title} {text}".strip()


def row_id(row: Mapping[str, Any], name: str) -> str:
    """The "_id" or "id" of a row, as text; `name` if it has none.

    Raises:
        TypeError: It is an object, a list or bytes.
    """
    given = row.get("_id")
    given = row.get("id") if given is None else given
    if isinstance(given, Mapping | list | bytes):
        raise TypeError(f"its id should be a text or a number, found {given!r:.80}")
    return name if given is None else str(given)


@contextmanager
def _open(path: Place) -> Generator[IO[bytes]]:
    try:
        with open_to_read(path) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # it is no regular file
        raise InputError(f"{path} cannot be read: {error}") from error


def _lines(
    path: Place, file: IO[bytes], offset: int = 0, number: int = 1
) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each line, beginning at an offset."""
    file.seek(offset)
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{path}:{number} should have {LONGEST_LINE:,} bytes at most, found more"
            )
        yield number, offset, line
        number += 1
        offset += len(line)
