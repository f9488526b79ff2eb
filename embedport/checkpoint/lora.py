"""A checkpoint's tensors with a LoRA adapter, merged tensor by tensor as they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .adapter import CONFIG, WEIGHTS, Lora
from .spec import ModelSpec
from .tensor_files import TensorInfo, open_holding
from .weights import Weights

# Rows that are held in float64 at a time.
BLOCK_ROWS = 4096


class AdaptedWeights(Weights):
    """The tensors of an unquantized checkpoint with an adapter: W + scaling * B @ A, in fp32.

    Reading a range of rows reads only these rows of W and B. A tensor that the adapter changes is
    float32; all others keep the base's dtype.

    Args:
        spec: The checkpoint's spec, with its `adapter`.
        names: As for `Weights`.

    Raises:
        CheckpointError: As for `Weights`; or the adapter does not fit the base.
    """

    def __init__(self, spec: ModelSpec, names: Iterable[str] | None = None) -> None:
        self._merge = spec.plan_merge()
        super().__init__(spec, names)

    def _find(self, name: str, headers: dict[str, TensorInfo]) -> TensorInfo | None:
        return self._merge.replaced.get(name) or super()._find(name, headers)

    @property
    def files(self) -> list[Path]:
        """The base's shards and the adapter's two files; the configuration has the scaling."""
        assert self.spec.adapter is not None
        folder = self.spec.adapter.folder
        return sorted({*super().files, folder / CONFIG, folder / WEIGHTS})

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Like `Weights.read`, but a tensor that the adapter changes is float32."""
        values, lora = super().read(name, rows), self._merge.added.get(name)
        if lora is None:
            return values
        merged = _delta(lora, rows)
        merged += values
        return merged


def _delta(lora: Lora, rows: slice) -> np.ndarray:
    """Rows of scaling * B @ A (transposed for an embedding table), float32."""
    with open_holding(lora.a, lora.b) as shard:
        a, b = shard.get_slice(lora.a.name), shard.get_slice(lora.b.name)
        if lora.is_table:
            left, right = a[:, rows].T, b[:].T
        else:
            left, right = b[rows], a[:]
    # In float32 the order of sums, and so the last bit, depends on the CPU and on the rows read.
    wide = right.astype(np.float64) * lora.scaling
    result = np.empty((len(left), right.shape[1]), np.float32)
    for start in range(0, len(left), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        result[block] = left[block].astype(np.float64) @ wide
    return result


def open_floats(spec: ModelSpec, names: Iterable[str] | None = None) -> Weights:
    """Open the tensors of an unquantized checkpoint, with its adapter merged if it has one.

    Args:
        spec: The checkpoint's spec.
        names: As for `Weights`.

    Raises:
        CheckpointError: As for `Weights` and `AdaptedWeights`.
    """
    return Weights(spec, names) if spec.adapter is None else AdaptedWeights(spec, names)
