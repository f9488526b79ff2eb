"""GPTQ: each column's rounding error is made good by the columns that are still to come.

Frantar et al., arXiv:2210.17323. Groups keep their places ("static groups"): scales and zero points
are chosen before, from the weights, so columns may be visited in any order and no index of groups
is needed. Where pairs of codes are limited, the second of a pair takes what the first leaves.
"""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from .hqq import quantize_hqq
from .pairs import room
from .schemes import QuantizedTensor, QuantScheme

BLOCK = 128
DAMPING = 0.01
# How often the damping is made ten times as large before the Hessian is given up.
ATTEMPTS = 4


def quantize_gptq(
    weight: np.ndarray, hessian: np.ndarray, scheme: QuantScheme, *, act_order: bool = True
) -> QuantizedTensor:
    """Quantize a matrix so that its products with real inputs change least.

    Args:
        weight: float32 [out, in].
        hessian: float32 or float64 [in, in], the mean of x x^T over inputs x.
        scheme: How to quantize.
        act_order: Whether columns with large inputs are visited first.

    Raises:
        CheckpointError: The Hessian holds NaN or infinity, or cannot be inverted.
    """
    if not np.isfinite(hessian).all():
        raise CheckpointError("the calibration's activations are not finite")
    columns = weight.shape[1]
    diagonal = np.diag(hessian).astype(np.float64)
    base = quantize_hqq(weight, scheme, np.maximum(diagonal, 1e-12).astype(np.float32))
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    upper = _inverse_root(hessian[np.ix_(order, order)].astype(np.float64))
    groups = order // (scheme.group_size or columns)
    scales, zeros = base.scales[:, groups], base.zero_points[:, groups].astype(np.float32)
    remaining = weight[:, order].astype(np.float32)
    # Zero until a column is visited: its partner's room is then whole.
    codes = np.full(weight.shape, scheme.middle, np.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        # Column by column in memory: each step reads and writes whole columns.
        block = np.asfortranarray(remaining[:, start:end])
        errors = np.empty_like(block)
        for i in range(end - start):
            scale, zero = scales[:, start + i], zeros[:, start + i]
            column = order[start + i]
            found = np.rint(block[:, i] / scale) + zero
            if scheme.limits_pairs and column ^ 1 < columns:
                low, high = room(codes[:, column ^ 1] - zero)
                found = np.clip(found, low + zero, high + zero)
            found = np.clip(found, 0, scheme.levels - 1)
            codes[:, column] = found
            row = upper[start + i, start + i : end]
            errors[:, i] = (block[:, i] - (found - zero) * scale) / row[0]
            block[:, i:] -= errors[:, i, None] * row
        remaining[:, end:] -= errors @ upper[start:end, end:]
    return QuantizedTensor(scheme, codes, base.scales, base.zero_points)


def _inverse_root(hessian: np.ndarray) -> np.ndarray:
    """Upper U with U^T U the damped Hessian's inverse: float32 [in, in].

    Args:
        hessian: float64 [in, in]; damped in place, since a wide matrix's takes a gigabyte.
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
