"""A shard's file: how it is written, and whether it is complete.

A file gets its name only when it is complete, in an object store too. A local file may be damaged
later, so its header is read as well; an object is judged by its size.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import require
from ..texts.corpus import Part, Row
from .tables import make_table, write_table

SHARD_FORMATS = ("npy", "parquet")


def write_shard(
    file: IO[bytes], form: str, rows: Sequence[Row], vectors: np.ndarray, *, with_text: bool
) -> None:
    """Write a shard.

    Args:
        file: An open file.
        form: One of `SHARD_FORMATS`; "npy" has the vectors only.
        rows: The texts.
        vectors: [rows, width].
        with_text: Whether Parquet has the texts, too.
    """
    if form == "npy":
        np.save(file, vectors)
        return
    texts = [row.text for row in rows] if with_text else None
    write_table(file, make_table([row.id for row in rows], vectors, texts), ".parquet")


def is_complete(path: Path, form: str, part: Part, width: int, dtype: str) -> bool:
    """Whether a local shard is complete; a damaged one counts as missing.

    Args:
        path: Its file.
        form: One of `SHARD_FORMATS`.
        part: Its texts.
        width: Values of a vector, as stored.
        dtype: numpy's name of their dtype.
    """
    try:
        with path.open("rb") as file:
            if form == "parquet":
                return _count_parquet(file) == part.rows
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, _, stored = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + part.rows * width * stored.itemsize
            return (
                shape == (part.rows, width)
                and str(stored) == dtype
                and os.fstat(file.fileno()).st_size == size
            )
    except (OSError, ValueError):
        return False


def has_size(size: int, form: str, part: Part, width: int, dtype: str) -> bool:
    """Whether an object of this many bytes can be a shard."""
    if form == "parquet":
        return size > 0
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {"shape": (part.rows, width), "fortran_order": False, "descr": np.dtype(dtype).str},
    )
    return size == header.tell() + part.rows * width * np.dtype(dtype).itemsize


def _count_parquet(file: IO[bytes]) -> int:
    require("pyarrow", "arrow")
    from pyarrow import parquet

    return parquet.read_metadata(file).num_rows
