"""Texts in a Parquet file: the column "text", and perhaps "title", and "_id" or "id".

A part of a corpus is within one row group, of which no more than a few pages are in memory.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any

from ..errors import InputError, require
from ..progress import progress_bar
from ..storage import Place, open_to_read
from .corpus import Corpus, Part, Row, check_prompt, row_id, titled_text
from .prompts import check_text

COLUMNS = ("_id", "id", "title", "text", "prompt")
READ_ROWS = 1024
BUFFER = 1 << 20


def survey_parquet(
    path: Place,
    part_rows: int,
    part_bytes: int,
    *,
    prompt: str | None = "document",
    progress: bool = False,
) -> Corpus:
    """Check every row of a file, and cut it into parts: as `embedport.texts.corpus.survey`.

    Raises:
        InputError: The file is missing or damaged, has no texts, or a row is invalid.
    """
    parts: list[Part] = []
    first = 0
    with _open(path) as (file, size, sha256):
        with progress_bar("Reading", file.metadata.num_rows, enabled=progress) as advance:
            for group in range(file.num_row_groups):
                start = rows = held = crc = 0
                for number, row in enumerate(_rows(path, file, group, prompt)):
                    check_prompt(f"{path}, row {first + rows}", row.prompt, prompt)
                    data = row.text.encode()
                    crc = zlib.crc32(data, crc if rows else 0)
                    rows, held = rows + 1, held + len(data)
                    if rows == part_rows or held >= part_bytes:
                        parts.append(Part(first, rows, group, start, crc))
                        first, start, rows, held = first + rows, number + 1, 0, 0
                    advance(1)
                if rows:
                    parts.append(Part(first, rows, group, start, crc))
                    first += rows
        if not parts:
            raise InputError(f"{path} holds no text")
        return Corpus(size, sha256, first, tuple(parts))


def stream_parquet(path: Place, *, progress: bool = False) -> Iterator[Row]:
    """Read every row of a file once, with its prompt: as `embedport.texts.corpus.stream_rows`.

    Raises:
        InputError: The file is missing or damaged, or a row is invalid.
    """
    with (
        _open(path, digest=False) as (file, _, _),
        progress_bar("Reading", file.metadata.num_rows, enabled=progress) as advance,
    ):
        for group in range(file.num_row_groups):
            for row in _rows(path, file, group):
                yield row
                advance(1)


def read_parquet_part(path: Place, part: Part) -> list[Row]:
    """Read the rows of a part: its `offset` is a row group, its `line` a row in it.

    Raises:
        InputError: The file has changed since the survey.
    """
    rows_read: list[Row] = []
    with _open(path, digest=False) as (file, _, _):
        if part.offset < file.num_row_groups:
            for number, row in enumerate(_rows(path, file, part.offset)):
                if number >= part.line:
                    rows_read.append(row)
                if len(rows_read) == part.rows:
                    break
    crc = 0
    for row in rows_read:
        crc = zlib.crc32(row.text.encode(), crc)
    if len(rows_read) < part.rows or crc != part.crc32:
        raise InputError(
            f"{path} should hold the same {part.rows:,} texts from row {part.first:,} on as when "
            "the work began, found others: the file has changed"
        )
    return rows_read


@contextmanager
def _open(path: Place, *, digest: bool = True) -> Generator[tuple[Any, int, str]]:
    """Open a file: pyarrow's ParquetFile, its bytes, and its sha256 if asked for."""
    require("pyarrow", "arrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open_to_read(path) as source:
            sha256 = _hash(source) if digest else ""
            size = source.seek(0, 2)
            source.seek(0)
            yield ParquetFile(source, buffer_size=BUFFER), size, sha256
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


def _hash(source: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := source.read(BUFFER):
        digest.update(block)
    return digest.hexdigest()


def _rows(path: Place, file: Any, group: int, prompt: str | None = "document") -> Iterator[Row]:
    """The rows of a group; `prompt` is of those that name none."""
    names = file.schema_arrow.names
    if "text" not in names:
        raise InputError(f'{path} should have a column "text", found {", ".join(names)}')
    columns = [name for name in COLUMNS if name in names]
    for name in columns:
        if names.count(name) > 1:
            raise InputError(f'{path} should have one column "{name}", found {names.count(name)}')
    number = sum(file.metadata.row_group(i).num_rows for i in range(group))
    for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
        for values in batch.to_pylist():
            yield _row(path, number, values, prompt)
            number += 1


def _row(path: Place, number: int, values: dict[str, Any], prompt: str | None) -> Row:
    try:
        text = check_text(number, titled_text(values))
        if values.get("prompt") is not None:  # a null says nothing
            prompt = check_text(number, values["prompt"])
    except (InputError, TypeError) as error:
        raise InputError(f"{path}, row {number} should have a text: {error}") from error
    try:
        return Row(row_id(values, str(number)), text, prompt)
    except TypeError as error:
        raise InputError(f"{path}, row {number}: {error}") from error
