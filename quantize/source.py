"""Weight sources: a checkpoint, or a transformation of another source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from ..checkpoint.spec import ModelSpec
from .schemes import QuantizedTensor, QuantScheme

# Values of a range of rows: a table of 150,000 is never whole in memory in fp32.
CHUNK_VALUES = 16 << 20

Quantize = Callable[[np.ndarray, QuantScheme], QuantizedTensor]


class WeightSource(Protocol):
    """The tensors of a model by their `Qwen3Model` names; `checkpoint.weights.Weights` is one.

    Attributes:
        spec: The checkpoint's spec.
        output_rotation: float32 [hidden, hidden], multiplies the final norm's output to return it
            to the checkpoint's own basis; None if it is already in that basis.
    """

    spec: ModelSpec
    output_rotation: np.ndarray | None

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        ...

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no for the final norm's output: float32 [hidden]."""
        ...


class DerivedWeights:
    """A source that reads another one's tensors, and changes some of them.

    Args:
        source: The other source.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.spec: ModelSpec = source.spec
        self.output_rotation: np.ndarray | None = source.output_rotation

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no: float32 [hidden]."""
        return self._source.answer_row(yes, no)


class DequantizedWeights(DerivedWeights):
    """A source with some of its projections replaced by what their codes stand for.

    Args:
        source: The original weights.
        done: The quantized projections, by name.
    """

    def __init__(self, source: WeightSource, done: Mapping[str, QuantizedTensor]) -> None:
        super().__init__(source)
        self._done = done

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        matrix = name.removesuffix(".weight")
        if matrix in self._done:
            return self._done[matrix].dequantize()[rows]
        return self._source.read_fp32(name, rows)


def row_ranges(shape: tuple[int, ...]) -> list[slice]:
    """Cut a tensor of this shape into ranges of rows, of 16 million values at most."""
    step = max(1, CHUNK_VALUES // math.prod(shape[1:]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def quantize_rows(
    source: WeightSource, name: str, scheme: QuantScheme, quantize: Quantize
) -> QuantizedTensor:
    """Quantize a matrix of any size, one range of rows at a time."""
    shape = source.spec.tensor_shapes()[f"{name}.weight"]
    return QuantizedTensor.concatenate(
        [quantize(source.read_fp32(f"{name}.weight", rows), scheme) for rows in row_ranges(shape)]
    )
