"""Unpack packed codes, and decode float codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# The order of eight output channels in an int32 of AutoAWQ's "gemm" format.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# OCP's 8-bit and 4-bit floats: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
FLOATS = {8: ml_dtypes.float8_e4m3fn, 4: ml_dtypes.float4_e2m1fn}


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack int32 [n, m] to uint8 [n, m * 32 / bits], lowest bits of a word first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return octets if bits == 8 else unpack_pairs(octets)


def unpack_pairs(octets: np.ndarray) -> np.ndarray:
    """Unpack uint8 [n, m] to uint8 [n, 2 m], lower four bits first."""
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """Unpack int32 [n, m] to uint8 [n, 8 m], undoing AutoAWQ's order of a word's eight codes."""
    codes = unpack(words, 4).reshape(len(words), -1, 8)
    ordered = np.empty_like(codes)
    ordered[:, :, AWQ_ORDER] = codes
    return ordered.reshape(len(words), -1)


def shift(values: np.ndarray, bits: int) -> np.ndarray:
    """Shift int8 values around zero to uint8 codes, by adding 2^(bits - 1)."""
    return values.view(np.uint8) + np.uint8(1 << (bits - 1))


def float_values(bits: int) -> np.ndarray:
    """The value of each float code: float32 [2^bits]."""
    return np.arange(1 << bits, dtype=np.uint8).view(FLOATS[bits]).astype(np.float32)
