"""fp8 quantization: e4m3 (4 exponent bits, 3 mantissa bits), one scale per output row."""

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
        scheme: The quantization scheme; only its `scale_dtype` is used.

    Returns:
        (values float8_e4m3fn [out, in], scales float32 [out, 1]): weight ~ values * scales.
    """
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scales = scheme.representable(np.maximum(largest / LARGEST, np.finfo(np.float32).tiny))
    return np.clip(weight / scales, -LARGEST, LARGEST).astype(E4M3), scales
