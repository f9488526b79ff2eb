"""Quantization schemes, and quantized matrices, independent of any file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from ..errors import InputError
from . import nf4

ScaleDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class QuantScheme:
    """Bits and groups of a quantized matrix.

    Attributes:
        bits: 4 or 8.
        group_size: Number of inputs that share a scale; None for one scale per output row.
        symmetric: Whether every zero point is the middle of the range.
        scale_dtype: The dtype that scales are rounded to, though they are held as float32. So codes
            are computed with the same scales that a checkpoint stores in 16 bits.
        limits_pairs: Whether codes of inputs 2i and 2i + 1, around zero, sum to -128 .. 128, so
            that no CPU saturates a product with 8-bit activations: see `quantize.pairs`. Requires
            8 bits and one symmetric scale per output row.
        nf4: Whether a code is the number of one of NF4's levels: see `quantize.nf4`. Requires 4
            bits and no zero points.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: ScaleDtype = "float32"
    limits_pairs: bool = False
    nf4: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"bits should be 4 or 8, found {self.bits}")
        if self.group_size is not None and self.group_size < 16:
            raise InputError(f"group_size should be at least 16, found {self.group_size}")
        if self.limits_pairs and (self.bits, self.group_size, self.symmetric) != (8, None, True):
            raise InputError(f"limits_pairs goes with 8 bits, no groups, symmetric; found {self}")
        if self.nf4 and (self.bits, self.symmetric) != (4, True):
            raise InputError(f"nf4 goes with 4 bits, symmetric; found {self}")

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    def representable(self, scales: np.ndarray) -> np.ndarray:
        """Round positive scales to `scale_dtype`, with none becoming zero: float32."""
        dtype = np.dtype(self.scale_dtype)  # ml_dtypes tells numpy its dtypes' names
        smallest = np.float32(ml_dtypes.finfo(dtype).smallest_subnormal)
        return np.maximum(scales.astype(dtype).astype(np.float32), smallest)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest value of a symmetric scheme, in units of its scale."""
        return 1 if self.nf4 else self.middle - 1

    def encode(self, values: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """The nearest codes, as float32, of values in units of their scales; overwrites them."""
        if self.nf4:
            # A seventh of searchsorted's time.
            codes = np.zeros(values.shape, np.uint8)
            for bound in nf4.BOUNDS:
                codes += values > bound
            values[...] = codes
            return values
        np.rint(values, out=values)
        values += zeros
        return np.clip(values, 0, self.levels - 1, out=values)

    def decode(self, codes: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Values in units of their scales: float32."""
        return nf4.LEVELS[codes.astype(np.uint8)] if self.nf4 else codes - zeros


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix [out, in], as a checkpoint stores a projection or the embedding table.

    Attributes:
        scheme: Its quantization scheme.
        codes: uint8 [out, in], below 2^bits, not packed.
        scales: float32 [out, groups]; the last group may be shorter.
        zero_points: uint8 [out, groups].
    """

    scheme: QuantScheme
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Put ranges of a matrix's rows together."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            parts[0].scheme,
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate([part.zero_points for part in parts]),
        )

    def dequantize(self) -> np.ndarray:
        """(codes - zero_points) * scales, or the codes' levels * scales: float32 [out, in]."""
        zeros = self._widen(self.zero_points).astype(np.float32)
        return self.scheme.decode(self.codes, zeros) * self._widen(self.scales)

    def signed_codes(self) -> np.ndarray:
        """Symmetric codes around zero: int8 [out, in]; 4-bit codes are in -8..7."""
        return (self.codes - np.uint8(self.scheme.middle)).view(np.int8)

    def _widen(self, groups: np.ndarray) -> np.ndarray:
        columns = self.codes.shape[1]
        return np.repeat(groups, self.scheme.group_size or columns, axis=1)[:, :columns]
