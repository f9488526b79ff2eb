"""Write safetensors tensor by tensor: memory holds one piece of one tensor, not a shard.

Layout of a file: the header's length (uint64), the header (JSON, padded with spaces), then the
tensors' bytes without gaps, each at a multiple of its item size. The header is written last, into
reserved space: the length of bitsandbytes' own record of a matrix is known only once the matrix is
quantized. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypedDict

import numpy as np

from ...artifact.layout import write_json
from ...checkpoint.tensor_files import INDEX, SINGLE

SHARD_BYTES = 4 << 30
DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}
ALIGNMENT = 8
# Space for a header's entry: a name of up to about 80 characters, dtype, shape and two offsets.
ENTRY_BYTES = 256


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class ShardWriter:
    """Writes a checkpoint's tensors to one or more shards; the end of `with` completes them.

    Args:
        folder: The shards' folder.
        tensors: The largest number of tensors to write.
        shard_bytes: A new shard begins before a tensor would exceed this many bytes.

    Attributes:
        names: The stored names of the tensors so far.
    """

    def __init__(self, folder: Path, tensors: int, shard_bytes: int = SHARD_BYTES) -> None:
        self.names: set[str] = set()
        self._folder = folder
        self._header_bytes = 8 + -(-(tensors * ENTRY_BYTES + 1024) // 4096) * 4096
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, _Entry]] = []
        self._file: BinaryIO | None = None
        self._total = 0
        self._late: list[tuple[str, np.ndarray]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """Write a tensor."""
        self.add_rows(name, array.dtype, array.shape, [array])

    def add_rows(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray]
    ) -> None:
        """Write a tensor from pieces of its rows.

        Args:
            name: The stored name.
            dtype: One of `DTYPES`.
            shape: The whole tensor's shape.
            pieces: Ranges of its rows, in order.
        """
        self.names.add(name)
        size = math.prod(shape) * dtype.itemsize
        if size % ALIGNMENT:
            # A tensor that would misalign the next one is written at the shard's end.
            flat = [np.ascontiguousarray(piece).reshape(-1) for piece in pieces]
            self._late.append((name, np.concatenate(flat).reshape(shape)))
            return
        if self._file is not None and self._written + size > self._shard_bytes:
            self._finish_shard()
        self._write(name, dtype, shape, pieces)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_shard()
            self._write_index()
        elif self._file is not None:
            self._file.close()

    @property
    def _written(self) -> int:
        assert self._file is not None
        return self._file.tell() - self._header_bytes

    def _write(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray]
    ) -> None:
        if self._file is None:
            self._file = self._path(len(self._shards)).open("wb")
            self._file.seek(self._header_bytes)
            self._shards.append({})
        start = self._written
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        end = self._written
        self._total += end - start
        self._shards[-1][name] = _Entry(
            dtype=DTYPES[dtype.name], shape=list(shape), data_offsets=[start, end]
        )

    def _finish_shard(self) -> None:
        # Largest items first: then each tensor begins at a multiple of its item size.
        for name, array in sorted(self._late, key=lambda entry: -entry[1].dtype.itemsize):
            self._write(name, array.dtype, array.shape, [array])
        self._late.clear()
        assert self._file is not None
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}).encode()
        padded_bytes = self._header_bytes - 8
        assert len(header) <= padded_bytes
        self._file.seek(0)
        self._file.write(padded_bytes.to_bytes(8, "little") + header.ljust(padded_bytes))
        self._file.close()
        self._file = None

    def _write_index(self) -> None:
        """Write the index, and give the shards their names, now that their number is known."""
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._folder / SINGLE)
            return
        index: dict[str, str] = {}
        for number, tensors in enumerate(self._shards):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self._folder / name)
            index |= dict.fromkeys(tensors, name)
        write_json(
            self._folder / INDEX,
            {"metadata": {"total_size": self._total}, "weight_map": index},
        )

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}.partial"
