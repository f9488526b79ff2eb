"""Vectors as Arrow tables, in Parquet and Arrow files: id, text if wanted, vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from ..errors import require

TABLES = (".parquet", ".arrow")


def make_table(ids: Sequence[str], vectors: np.ndarray, texts: Sequence[str] | None) -> Any:
    """A pyarrow table.

    Args:
        ids: Each row's id.
        vectors: float32, int8 or uint8 [rows, width].
        texts: Each row's text; None leaves the column out.

    Returns:
        The columns "id" (string), "text" (string) if wanted, and "vector" (fixed-size list).

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    require("pyarrow", "arrow")
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    if texts is not None:
        columns["text"] = pa.array(texts, pa.string())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return pa.table(columns)


def write_table(file: IO[bytes], table: Any, suffix: str) -> None:
    """Write a table as Parquet, or as an Arrow IPC file.

    Args:
        file: An open file.
        table: From `make_table`.
        suffix: One of `TABLES`.
    """
    if suffix == ".parquet":
        from pyarrow import parquet

        # Vectors do not compress, and dictionaries of them only cost.
        parquet.write_table(table, file, use_dictionary=False, compression="zstd")
        return
    from pyarrow import ipc

    with ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
