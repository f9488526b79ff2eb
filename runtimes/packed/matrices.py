"""Matrices of a layer on a CUDA device: in 16 bits, in 8 bits with rounded rows, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from ..triton_kernels import Rows
from . import kernels

# Up to this many tokens a matrix is unpacked inside the product; for more it is unpacked first, and
# cuBLAS multiplies. Not measured on a GPU yet.
FUSED_TOKENS = 64


class Matrix(Protocol):
    """A matrix [out, in], or several that read the same rows, one below the other."""

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """Multiply each row by the matrix: [tokens, out] in `dtype`."""
        ...


@dataclass(frozen=True)
class PlainMatrix:
    """weight [out, in], in 16 bits."""

    weight: torch.Tensor

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """As `Matrix`."""
        return functional.linear(rows.values, self.weight)


@dataclass(frozen=True)
class ScaledMatrix:
    """weight fp8 or int8 [out, in], scales float32 [1, out]; rows have the weight's dtype."""

    weight: torch.Tensor
    scales: torch.Tensor

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """As `Matrix`."""
        assert rows.scales is not None
        if self.weight.dtype == torch.int8:
            return kernels.multiply_int8(rows.values, rows.scales, self.weight, self.scales, dtype)
        return functional.scaled_mm(
            rows.values,
            self.weight.t(),
            rows.scales,
            ScalingType.RowWise,
            self.scales,
            ScalingType.RowWise,
            output_dtype=dtype,
            use_fast_accum=True,
        )


@dataclass(frozen=True)
class PackedMatrix:
    """Codes of 4 or 8 bits in groups; see `kernels` for their order.

    Attributes:
        codes: uint8 [out, groups * group * bits / 8].
        scales: [groups, out], floating point.
        zeros: uint8 [groups, out], zero points; None for 2^(bits - 1), or with `levels`.
        levels: float32 [2^bits], the value of each code (NF4); None for code - zero point.
        bits: 4 or 8.
        group: Inputs that share a scale: 32, 64 or 128.
        width: Inputs.
        buffer: fp16 or bf16 [at least out * in], where large batches have it unpacked. All matrices
            of a model share it.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    levels: torch.Tensor | None
    bits: int
    group: int
    width: int
    buffer: torch.Tensor

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """As `Matrix`."""
        if len(rows.values) <= FUSED_TOKENS:
            return kernels.multiply_packed(rows.values, self)
        weight = self.buffer[: len(self.codes) * self.width].view(-1, self.width)
        kernels.unpack(self, weight)
        return functional.linear(rows.values, weight)


@dataclass(frozen=True)
class StackedMatrix:
    """Matrices of different forms that read the same rows."""

    parts: Sequence[Matrix]

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """As `Matrix`."""
        return torch.cat([part(rows, dtype) for part in self.parts], dim=1)


def pack(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Pack codes, uint8 [out, in], in the order of `kernels`: [out, groups * group * bits / 8]."""
    padded = functional.pad(codes, (0, -codes.shape[1] % group))
    if bits == 8:
        return padded.contiguous()
    low, high = padded.view(len(codes), -1, 2, group // 2).unbind(2)
    return (low | high << 4).flatten(1).contiguous()


def stack(parts: Sequence[Matrix]) -> Matrix:
    """One matrix of several, [sum of out, in]; a single product if they have the same form."""
    plain = [part for part in parts if isinstance(part, PlainMatrix)]
    scaled = [part for part in parts if isinstance(part, ScaledMatrix)]
    packed = [part for part in parts if isinstance(part, PackedMatrix)]
    if len(parts) == 1:
        return parts[0]
    if len(plain) == len(parts):
        return PlainMatrix(torch.cat([part.weight for part in plain]))
    if len(scaled) == len(parts):
        return ScaledMatrix(
            torch.cat([part.weight for part in scaled]),
            torch.cat([part.scales for part in scaled], dim=1),
        )
    forms = {
        (part.bits, part.group, part.levels if part.levels is None else tuple(part.levels.tolist()))
        for part in packed
    }
    if len(packed) < len(parts) or len(forms) > 1:
        return StackedMatrix(parts)
    zeros = None
    if any(part.zeros is not None for part in packed):
        zeros = torch.cat([_zeros(part) for part in packed], dim=1)
    return replace(
        packed[0],
        codes=torch.cat([part.codes for part in packed]),
        scales=torch.cat([part.scales for part in packed], dim=1),
        zeros=zeros,
    )


def _zeros(matrix: PackedMatrix) -> torch.Tensor:
    """The zero points, uint8 [groups, out], also where none are stored."""
    if matrix.zeros is not None:
        return matrix.zeros
    middle = 1 << (matrix.bits - 1)
    return torch.full_like(matrix.scales, middle, dtype=torch.uint8)
