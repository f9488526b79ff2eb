"""GPTQ: round column by column, and correct the remaining columns for each column's error.

Frantar et al., arXiv:2210.17323. Groups are static: scales and zero points are chosen beforehand
from the weights. So columns may be visited in any order (act-order), and no group index has to be
stored. With limited pairs, the second code of a pair is limited by the first.
"""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from .mse import quantize_mse
from .pairs import room
from .schemes import QuantizedTensor, QuantScheme

BLOCK = 128
DAMPING = 0.01
# Number of tries, each with ten times the damping, before giving up on a Hessian.
ATTEMPTS = 4


def quantize_gptq(
    weight: np.ndarray, hessian: np.ndarray, scheme: QuantScheme, *, act_order: bool = True
) -> QuantizedTensor:
    """Quantize a matrix so that its products with real inputs change least.

    Args:
        weight: float32 [out, in].
        hessian: float32 or float64 [in, in], the mean of x x^T over inputs x.
        scheme: The quantization scheme.
        act_order: Whether to visit columns with large inputs first.

    Raises:
        CheckpointError: The Hessian contains NaN or infinity, or cannot be inverted.
    """
    if not np.isfinite(hessian).all():
        raise CheckpointError("the calibration's activations are not finite")
    columns = weight.shape[1]
    diagonal = np.diag(hessian).astype(np.float64)
    base = quantize_mse(weight, scheme, np.maximum(diagonal, 1e-12).astype(np.float32))
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    upper = _inverse_root(hessian[np.ix_(order, order)].astype(np.float64))
    groups = order // (scheme.group_size or columns)
    scales, zeros = base.scales[:, groups], base.zero_points[:, groups].astype(np.float32)
    remaining = weight[:, order].astype(np.float32)
    # A column that is not visited yet counts as zero: its partner has the full range.
    codes = np.full(weight.shape, scheme.middle, np.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        # Column-major: each step reads and writes whole columns.
        block = np.asfortranarray(remaining[:, start:end])
        errors = np.empty_like(block)
        for i in range(end - start):
            scale, zero = scales[:, start + i], zeros[:, start + i]
            column = order[start + i]
            rounded = np.rint(block[:, i] / scale) + zero
            if scheme.limits_pairs and column ^ 1 < columns:
                low, high = room(codes[:, column ^ 1] - zero)
                rounded = np.clip(rounded, low + zero, high + zero)
            rounded = np.clip(rounded, 0, scheme.levels - 1)
            codes[:, column] = rounded
            row = upper[start + i, start + i : end]
            errors[:, i] = (block[:, i] - (rounded - zero) * scale) / row[0]
            block[:, i:] -= errors[:, i, None] * row
        remaining[:, end:] -= errors @ upper[start:end, end:]
    return QuantizedTensor(scheme, codes, base.scales, base.zero_points)


def _inverse_root(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular U with U^T U = (damped Hessian)^-1: float32 [in, in].

    Args:
        hessian: float64 [in, in]; damped in place, since it can take a gigabyte.
    """
    diagonal = np.diag(hessian).copy()
    damping = DAMPING * max(float(diagonal.mean()), 1e-12)
    for _ in range(ATTEMPTS):
        np.fill_diagonal(hessian, diagonal + damping)
        try:
            return np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
        except np.linalg.LinAlgError:
            damping *= 10
    raise CheckpointError("the calibration's Hessian cannot be inverted: give more texts")
