"""Eight-bit floats: e4m3, four bits of exponent and three of mantissa, a scale an output row."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .schemes import QuantScheme

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = float(ml_dtypes.finfo(E4M3).max)


def quantize_fp8(weight: np.ndarray, scheme: QuantScheme) -> tuple[np.ndarray, np.ndarray]:
    """Round each value to the nearest float8.

    Args:
        weight: float32 [out, in].
        scheme: Only its `scale_dtype` counts.

    Returns:
        (values float8_e4m3fn [out, in], scales float32 [out, 1]): the matrix is their product.
    """
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scales = scheme.representable(np.maximum(largest / LARGEST, np.finfo(np.float32).tiny))
    return np.clip(weight / scales, -LARGEST, LARGEST).astype(E4M3), scales
