"""RTN: round to nearest, the quantization that needs no search and no data."""

from __future__ import annotations

import numpy as np

from .pairs import choose_shares, round_pairs
from .schemes import QuantizedTensor, QuantScheme


def quantize_rtn(
    weight: np.ndarray, scheme: QuantScheme, share: float | None = None
) -> QuantizedTensor:
    """Round each value to the nearest code of its group.

    Args:
        weight: float32 [out, in].
        scheme: The quantization scheme.
        share: The fraction of each group's range that the codes cover; values beyond are clipped.
            By default 1; with limited pairs, each row's share with the least error.
    """
    if scheme.limits_pairs:
        return _limited(weight, scheme, choose_shares(weight) if share is None else share)
    share = 1.0 if share is None else share
    out, columns = weight.shape
    size = scheme.group_size or columns
    groups = -(-columns // size)
    padded = weight
    if groups * size != columns:
        padded = np.zeros((out, groups * size), np.float32)
        padded[:, :columns] = weight
    values = padded.reshape(out, groups, size)
    top = scheme.levels - 1
    if scheme.symmetric:
        scales = share * np.abs(values).max(axis=2) / (scheme.middle - 1)
        scales = scheme.representable(np.maximum(scales, np.finfo(np.float32).tiny))
        zeros = np.full((out, groups), scheme.middle, np.uint8)
    else:
        low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
        scales = np.maximum(share * (high - low) / top, np.finfo(np.float32).tiny)
        scales = scheme.representable(scales)
        zeros = np.clip(np.rint(-share * low / scales), 0, top).astype(np.uint8)
    codes = np.rint(values / scales[:, :, None]) + zeros[:, :, None]
    codes = np.clip(codes, 0, top).astype(np.uint8).reshape(out, -1)[:, :columns]
    return QuantizedTensor(scheme, np.ascontiguousarray(codes), scales.astype(np.float32), zeros)


def _limited(
    weight: np.ndarray, scheme: QuantScheme, shares: np.ndarray | float
) -> QuantizedTensor:
    scales = shares * np.abs(weight).max(axis=1) / (scheme.middle - 1)
    scales = scheme.representable(np.maximum(scales, np.finfo(np.float32).tiny))[:, None]
    codes = (round_pairs(weight / scales) + scheme.middle).astype(np.uint8)
    zeros = np.full((len(weight), 1), scheme.middle, np.uint8)
    return QuantizedTensor(scheme, codes, scales, zeros)
