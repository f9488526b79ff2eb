"""Initializers that read the checkpoint only when they are written, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from ...checkpoint.weights import Weights
from ...errors import CheckpointError
from ...quantize.source import WeightSource

# Rows of this many bytes (in fp32) are converted at once.
CHUNK_BYTES = 32 << 20
TRANSPOSED_ROWS = 16
FP16_MAX = 65504.0


def lazy_tensor(
    name: str, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.LazyTensor:
    """An initializer whose values are made when it is written, and not kept."""
    return ir.LazyTensor(lambda: ir.tensor(make(), dtype=dtype), dtype, ir.Shape(shape), name=name)


class CheckpointTensor(ir.LazyTensor):
    """A checkpoint's tensor in another dtype, optionally transposed: [in, out] for a MatMul.

    Args:
        name: The initializer's name, and the tensor's in `weights`.
        weights: The checkpoint.
        dtype: FLOAT, FLOAT16 or BFLOAT16.
        transpose: Whether a matrix is stored transposed.
    """

    def __init__(
        self, name: str, weights: WeightSource, dtype: ir.DataType, *, transpose: bool = False
    ) -> None:
        self._stored_shape = weights.spec.tensor_shapes()[name]
        shape = ir.Shape(self._stored_shape[::-1] if transpose else self._stored_shape)
        super().__init__(lambda: ir.tensor(self._read(), dtype=dtype), dtype, shape, name=name)
        self._weights = weights
        # Untransformed weights are read in their stored dtype.
        self._rows = weights.read if isinstance(weights, Weights) else weights.read_fp32
        self._transpose = transpose

    def _read(self) -> np.ndarray:
        stored = self._rows(str(self.name), slice(None))
        return self._convert(transposed(stored) if self._transpose else stored)

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor; unless it is transposed, it is never whole in memory."""
        if self._transpose:
            self._read().tofile(file)
        else:
            for chunk in self._chunks():
                chunk.tofile(file)

    def _chunks(self) -> Iterator[np.ndarray]:
        rows, *rest = self._stored_shape
        step = max(1, CHUNK_BYTES // (4 * math.prod(rest)))
        for start in range(0, rows, step):
            yield self._convert(self._rows(str(self.name), slice(start, min(start + step, rows))))

    def _convert(self, stored: np.ndarray) -> np.ndarray:
        target = self.dtype.numpy()
        if stored.dtype == target:
            return stored
        values = stored.astype(np.float32)
        if self.dtype == ir.DataType.FLOAT16 and max(np.max(values), -np.min(values)) > FP16_MAX:
            raise CheckpointError(
                f"{self._weights.spec.source.folder}: tensor {self.name} has values beyond "
                f"{FP16_MAX:.0f}, the largest fp16; export with `precision` bf16 or fp32"
            )
        return values if self.dtype == ir.DataType.FLOAT else values.astype(target)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose, [m, n] to [n, m].

    Sixteen rows at a time fill whole cache lines: five times as fast as `ascontiguousarray`.
    """
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), TRANSPOSED_ROWS):
        out[:, start : start + TRANSPOSED_ROWS] = matrix[start : start + TRANSPOSED_ROWS].T
    return out
