"""RTN: round to nearest, the quantization that needs no search and no data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .pairs import choose_shares, round_pairs
from .schemes import QuantizedTensor, QuantScheme

TINY = np.finfo(np.float32).tiny


def quantize_rtn(
    weight: np.ndarray, scheme: QuantScheme, share: float | None = None
) -> QuantizedTensor:
    """Round each value to the nearest code of its group.

    Args:
        weight: float32 [out, in].
        scheme: The quantization scheme.
        share: With limited pairs, the fraction of each row's range that the codes cover; values
            beyond are clipped. By default, each row's share with the least error.
    """
    if scheme.limits_pairs:
        return _limited(weight, scheme, choose_shares(weight) if share is None else share)
    groups = Groups.of(weight, scheme)
    return groups.quantize(*groups.ranges(1.0))


@dataclass(frozen=True)
class Groups:
    """A matrix in groups, and the range of each.

    Attributes:
        scheme: The quantization scheme, without limited pairs.
        values: float32 [out, groups, size]; the last group is padded with zeros.
        columns: The matrix's inputs.
        low: float32 [out, groups], the least value, at most 0; unused if symmetric.
        high: float32 [out, groups], the greatest value, at least 0; if symmetric, the largest
            magnitude.
    """

    scheme: QuantScheme
    values: np.ndarray
    columns: int
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, scheme: QuantScheme) -> Groups:
        """Split a matrix, float32 [out, in], into its scheme's groups."""
        out, columns = weight.shape
        size = scheme.group_size or columns
        groups = -(-columns // size)
        padded = weight
        if groups * size != columns:
            padded = np.zeros((out, groups * size), np.float32)
            padded[:, :columns] = weight
        values = padded.reshape(out, groups, size)
        low = np.minimum(values.min(axis=2), 0)
        high = np.maximum(values.max(axis=2), 0)
        if scheme.symmetric:
            high = np.maximum(-low, high)
        return cls(scheme, values, columns, low, high)

    def ranges(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Scales, float32, and zero points, uint8, [out, groups], for a share of each range."""
        scheme, top = self.scheme, self.scheme.levels - 1
        if scheme.symmetric:
            scales = share * self.high / scheme.largest
            zeros = np.full(scales.shape, scheme.middle, np.uint8)
            return scheme.representable(np.maximum(scales, TINY)), zeros
        scales = np.maximum(share * (self.high - self.low) / top, TINY)
        scales = scheme.representable(scales)
        zeros = np.clip(np.rint(-share * self.low / scales), 0, top).astype(np.uint8)
        return scales, zeros

    def round(self, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """The nearest codes, as float32 [out, groups, size]."""
        return self.scheme.encode(self.values / scales[:, :, None], zeros[:, :, None])

    def quantize(self, scales: np.ndarray, zeros: np.ndarray) -> QuantizedTensor:
        """Round to the nearest codes of given scales and zero points."""
        codes = self.round(scales, zeros).astype(np.uint8)
        codes = codes.reshape(len(codes), -1)[:, : self.columns]
        return QuantizedTensor(self.scheme, np.ascontiguousarray(codes), scales, zeros)


def _limited(
    weight: np.ndarray, scheme: QuantScheme, shares: np.ndarray | float
) -> QuantizedTensor:
    scales = shares * np.abs(weight).max(axis=1) / (scheme.middle - 1)
    scales = scheme.representable(np.maximum(scales, TINY))[:, None]
    codes = (round_pairs(weight / scales) + scheme.middle).astype(np.uint8)
    zeros = np.full((len(weight), 1), scheme.middle, np.uint8)
    return QuantizedTensor(scheme, codes, scales, zeros)
