"""Files of texts, whatever their format: .txt and .jsonl by lines, Parquet by row groups."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..storage import Place
from . import corpus
from .corpus import Corpus, Part, Row
from .parquet import read_parquet_part, stream_parquet, survey_parquet

PARQUET = ".parquet"


def survey(
    path: Place,
    part_rows: int,
    part_bytes: int,
    *,
    prompt: str | None = "document",
    progress: bool = False,
) -> Corpus:
    """Check every text of a file, and cut it into parts.

    Args:
        path: A .txt, .jsonl or .parquet file.
        part_rows: Maximum texts per part.
        part_bytes: A part ends with the text that reaches this size.
        prompt: The prompt of all texts, as for `Embedder.encode`; a row may name no other.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        InputError: The file is missing, holds no text, has another suffix, or a text is invalid.
    """
    reader = survey_parquet if path.suffix.lower() == PARQUET else corpus.survey
    return reader(path, part_rows, part_bytes, prompt=prompt, progress=progress)


def read_part(path: Place, part: Part) -> list[Row]:
    """Read the texts of a part, with their ids.

    Raises:
        InputError: The file has changed since the survey.
    """
    reader = read_parquet_part if path.suffix.lower() == PARQUET else corpus.read_part
    return reader(path, part)


def stream_rows(path: Place, *, progress: bool = False) -> Iterator[Row]:
    """Read every text of a file once, with the prompts that rows name; memory holds a few rows.

    Raises:
        InputError: The file is missing, has another suffix, or a text is invalid.
    """
    reader = stream_parquet if path.suffix.lower() == PARQUET else corpus.stream_rows
    return reader(path, progress=progress)


def read_rows(path: Place, prompt: str | None) -> list[Row]:
    """Read all texts of a file, with their ids.

    Args:
        path: The file.
        prompt: As for `survey`.

    Raises:
        InputError: As for `survey`.
    """
    parts = survey(path, sys.maxsize, sys.maxsize, prompt=prompt).parts
    return [row for part in parts for row in read_part(path, part)]
