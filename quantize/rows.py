"""Quantize a matrix of any size in ranges of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .schemes import QuantizedTensor, QuantScheme
from .source import WeightSource, row_ranges

Quantize = Callable[[np.ndarray, QuantScheme], QuantizedTensor]


def quantize_rows(
    source: WeightSource, name: str, scheme: QuantScheme, quantize: Quantize
) -> QuantizedTensor:
    """Quantize a matrix, one range of rows at a time."""
    shape = source.spec.tensor_shapes()[f"{name}.weight"]
    return QuantizedTensor.concatenate(
        [quantize(source.read_fp32(f"{name}.weight", rows), scheme) for rows in row_ranges(shape)]
    )
