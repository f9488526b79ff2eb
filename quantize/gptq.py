"""GPTQ and GPTAQ: round column by column, and correct the remaining columns for each error.

GPTQ: Frantar et al., arXiv:2210.17323. Groups are static: scales and zero points are chosen
beforehand from the weights. So columns may be visited in any order (act-order), and no group index
has to be stored. With limited pairs, the second code of a pair is limited by the first.

GPTAQ: Li et al., arXiv:2504.02692, "asymmetric calibration". The quantized layers before a matrix
W have changed its inputs from x to y, and W y is no longer what the layers after it should see. So
the rounded matrix Q should minimize the mean |W x - Q y|^2. With H = mean y y^T and
C = mean (x - y) y^T that is, up to a constant, (W' - Q) H (W' - Q)^T for W' = W + W C H^-1: GPTQ of
a shifted matrix. The paper derives the same shift column by column.
"""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from .mse import quantize_mse
from .pairs import room
from .schemes import QuantizedTensor, QuantScheme

# Columns that are corrected one after another; those after them are corrected by one product.
BLOCK = 64
# Relative to the mean of the Hessian's diagonal.
DAMPING = 0.01
# Number of tries, each with ten times the damping, before giving up on a Hessian.
ATTEMPTS = 4
# Triangular matrices up to this size are inverted by LAPACK.
SMALL = 64
NOT_FINITE = "the calibration's activations are not finite"
NOT_INVERTIBLE = "the calibration's Hessian cannot be inverted: give more texts"


class Curvature:
    """The second moments of a matrix's inputs, prepared once for all matrices that read them.

    Args:
        hessian: float32 or float64 [in, in], the mean of y y^T over inputs y.
        act_order: Whether to visit columns with large inputs first.

    Attributes:
        diagonal: float32 [in], each input's mean square.
        order: int [in], the columns in the order of the visit.
        upper: float32 [in, in], upper triangular; upper^T upper is the inverse of the damped and
            reordered Hessian.

    Raises:
        CheckpointError: The Hessian contains NaN or infinity, or cannot be inverted.
    """

    def __init__(self, hessian: np.ndarray, *, act_order: bool = True) -> None:
        if not np.isfinite(hessian).all():
            raise CheckpointError(NOT_FINITE)
        diagonal = np.diag(hessian).astype(np.float64)
        self.diagonal = diagonal.astype(np.float32)
        self.order = np.arange(len(hessian))
        if act_order:
            self.order = np.argsort(-diagonal, kind="stable")
        self.upper = _inverse_root(hessian[np.ix_(self.order, self.order)].astype(np.float64))

    def shifted(self, weight: np.ndarray, cross: np.ndarray) -> np.ndarray:
        """GPTAQ's W + W C H^-1.

        Args:
            weight: W, float32 [out, in].
            cross: C, float32 [in, in], the mean of (x - y) y^T.
        """
        product = (weight @ cross)[:, self.order]
        shifted = weight.copy()
        shifted[:, self.order] += (product @ self.upper.T) @ self.upper
        return shifted


def quantize_gptq(weight: np.ndarray, inputs: Curvature, scheme: QuantScheme) -> QuantizedTensor:
    """Quantize a matrix so that its products with real inputs change least.

    Args:
        weight: float32 [out, in]; for GPTAQ the shifted one.
        inputs: The second moments of its inputs.
        scheme: The quantization scheme.
    """
    columns = weight.shape[1]
    base = quantize_mse(weight, scheme, np.maximum(inputs.diagonal, 1e-12))
    groups = inputs.order // (scheme.group_size or columns)
    # Transposed: each step reads and writes whole rows.
    scales = np.ascontiguousarray(base.scales.T)
    zeros = np.ascontiguousarray(base.zero_points.T, np.float32)
    remaining = np.ascontiguousarray(weight.T[inputs.order], np.float32)
    # A column that is not visited yet counts as zero: its partner has the full range.
    codes = np.full(weight.shape[::-1], scheme.middle, np.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = remaining[start:end]
        errors = np.empty_like(block)
        for i in range(end - start):
            scale, zero = scales[groups[start + i]], zeros[groups[start + i]]
            column = inputs.order[start + i]
            rounded = scheme.encode(block[i] / scale, zero)
            if scheme.limits_pairs and column ^ 1 < columns:
                low, high = room(codes[column ^ 1] - zero)
                rounded = np.clip(rounded, low + zero, high + zero)
            codes[column] = rounded
            row = inputs.upper[start + i, start + i : end]
            errors[i] = (block[i] - scheme.decode(rounded, zero) * scale) / row[0]
            block[i + 1 :] -= row[1:, None] * errors[i]
        remaining[end:] -= inputs.upper[start:end, end:].T @ errors
    return QuantizedTensor(scheme, np.ascontiguousarray(codes.T), base.scales, base.zero_points)


def _inverse_root(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular U with U^T U = (damped Hessian)^-1: float32 [in, in].

    Reversing rows and columns turns an upper triangular matrix into a lower one. So if L is the
    Cholesky root of the reversed Hessian, U is the reversed inverse of L.

    Args:
        hessian: float64 [in, in]; damped in place, since it can take a gigabyte.
    """
    diagonal = np.diag(hessian).copy()
    damping = DAMPING * max(float(diagonal.mean()), 1e-12)
    for _ in range(ATTEMPTS):
        np.fill_diagonal(hessian, diagonal + damping)
        try:
            root = np.linalg.cholesky(hessian[::-1, ::-1])
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        _invert_lower(root)
        return np.ascontiguousarray(root[::-1, ::-1], np.float32)
    raise CheckpointError(NOT_INVERTIBLE)


def _invert_lower(lower: np.ndarray) -> None:
    """Invert a lower triangular matrix in place, half by half."""
    size = len(lower)
    if size <= SMALL:
        lower[...] = np.linalg.inv(lower)
        return
    half = size // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    below[...] = -last @ below @ first
