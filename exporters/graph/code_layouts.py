"""A QuantizedTensor's codes and zero points in the layouts that ONNX operators take."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ...errors import VerificationError
from ...quantize.pairs import LIMIT, find_excess
from ...quantize.schemes import QuantizedTensor
from .tensors import transposed


def signed_transposed(tensor: QuantizedTensor) -> np.ndarray:
    """Codes for MatMul and MatMulIntegerToFloat: int8 or int4 [in, out]."""
    codes = transposed(tensor.signed_codes())
    return codes if tensor.scheme.bits == 8 else codes.astype(ml_dtypes.int4)


def check_pairs(name: str, tensor: QuantizedTensor) -> None:
    """Refuse codes that make a product with 8-bit activations saturate on some CPUs.

    Args:
        name: The matrix, for the error.
        tensor: 8-bit codes with one scale per output row.

    Raises:
        VerificationError: A pair of codes is beyond the limit of `quantize.pairs`.
    """
    codes = tensor.signed_codes()
    excess = find_excess(codes)
    if excess is not None:
        row, column = excess
        first, second = codes[row, column : column + 2]
        raise VerificationError(
            f"{name}: the codes of inputs {column} and {column + 1} should sum to -{LIMIT} .. "
            f"{LIMIT}, found {first} and {second} in output row {row}, with which a product with "
            "8-bit activations saturates on CPUs without VNNI; quantize with a scheme that has "
            "limits_pairs"
        )


def blocks(tensor: QuantizedTensor) -> np.ndarray:
    """MatMulNBits' B: uint8 [out, blocks, block * bits / 8], the lower nibble first."""
    rows, groups = tensor.scales.shape
    size = tensor.scheme.group_size
    assert size is not None
    padded = np.zeros((rows, groups * size), np.uint8)
    padded[:, : tensor.codes.shape[1]] = tensor.codes
    return packed(padded, tensor.scheme.bits).reshape(rows, groups, -1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes: uint8 [n, m] to bytes [n, ceil(m * bits / 8)], the lower nibble first."""
    if bits == 8:
        return codes
    low, high = codes[:, ::2], codes[:, 1::2]
    out = low.copy()
    out[:, : high.shape[1]] |= high << 4
    return out
