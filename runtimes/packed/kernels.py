"""Triton kernels for products by packed weights, and by int8 weights and activations.

A packed matrix [out, in] has groups of 32, 64 or 128 inputs with one scale an output. Bytes are
[out, groups * group * bits / 8]. With 4 bits, byte i of a group holds input i in its lower half and
input i + group / 2 in its upper half: both halves meet inputs that lie side by side.
"""

# ruff: noqa: ANN001, ANN202 - the Triton compiler gives a kernel's arguments their types.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton.language

from ..triton_kernels import jit, power_of_two

if TYPE_CHECKING:
    from .matrices import PackedMatrix

# Any, for the type checker: it does not know how a kernel's constants are computed with.
tl: Any = triton.language

# tl.dot takes no fewer rows.
SMALLEST_BLOCK = 16
# Outputs of a program; tokens of a program, at most. Not measured on a GPU yet.
PACKED_OUTPUTS, PACKED_TOKENS = 32, 64
UNPACKED_ROWS = 16
INT8_OUTPUTS, INT8_TOKENS, INT8_INPUTS = 128, 128, 64
# Blocks of tokens that follow each other over the same weights, which then are in the L2 cache.
NEIGHBOURS = 8


def multiply_packed(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """X @ W.T, with W unpacked inside the product and rounded to the dtype of x.

    Args:
        x: fp16 or bf16 [tokens, in], contiguous.
        matrix: The matrix W.

    Returns:
        [tokens, out] in the dtype of x, summed in fp32.
    """
    tokens, width = x.shape
    outputs = len(matrix.codes)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    block = min(max(power_of_two(tokens), SMALLEST_BLOCK), PACKED_TOKENS)
    grid = (_ceiling(tokens, block), _ceiling(outputs, PACKED_OUTPUTS))
    _multiply_packed[grid](
        *(x, matrix.codes, matrix.scales, matrix.zeros, matrix.levels),
        *(out, tokens, outputs, width),
        bits=matrix.bits,
        group=matrix.group,
        block_tokens=block,
        block_outputs=PACKED_OUTPUTS,
        enable_fp_fusion=True,
    )
    return out


def unpack(matrix: PackedMatrix, out: torch.Tensor) -> None:
    """Write a packed matrix's values into `out` [out, in], fp16 or bf16, rounded to its dtype."""
    outputs, width = out.shape
    grid = (_ceiling(outputs, UNPACKED_ROWS), len(matrix.scales))
    _unpack[grid](
        *(matrix.codes, matrix.scales, matrix.zeros, matrix.levels, out, outputs, width),
        bits=matrix.bits,
        group=matrix.group,
        block_outputs=UNPACKED_ROWS,
        enable_fp_fusion=True,
    )


def multiply_int8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(x @ weight.T) * x_scales * scales: int8 products, int32 sums, scales behind.

    Args:
        x: int8 [tokens, in], contiguous.
        x_scales: float32 [tokens, 1].
        weight: int8 [out, in], contiguous.
        scales: float32 [1, out].
        dtype: The result's dtype.

    Returns:
        [tokens, out].
    """
    (tokens, width), outputs = x.shape, len(weight)
    out = torch.empty((tokens, outputs), dtype=dtype, device=x.device)
    block = min(max(power_of_two(tokens), SMALLEST_BLOCK), INT8_TOKENS)
    grid = (_ceiling(tokens, block) * _ceiling(outputs, INT8_OUTPUTS),)
    _multiply_int8[grid](
        *(x, x_scales, weight, scales, out, tokens, outputs, width),
        block_tokens=block,
        block_outputs=INT8_OUTPUTS,
        block_inputs=INT8_INPUTS,
        neighbours=NEIGHBOURS,
        num_warps=8 if block == INT8_TOKENS else 4,
        enable_fp_fusion=True,
    )
    return out


def _ceiling(count: int, step: int) -> int:
    return -(-count // step)


@jit
def _values(
    codes, scales, zeros, levels,
    bits: tl.constexpr, part: tl.constexpr,
    has_zeros: tl.constexpr, has_levels: tl.constexpr,
):  # fmt: skip
    """The values of one part of the bytes `codes`, in fp32."""
    picked = (codes >> (part * bits)) & (255 >> (8 - bits))
    if has_levels:
        return tl.load(levels + picked.to(tl.int32)) * scales
    if has_zeros:
        return (picked.to(tl.float32) - zeros.to(tl.float32)) * scales
    return (picked.to(tl.float32) - (1 << (bits - 1))) * scales


@jit
def _multiply_packed(
    x, codes, scales, zeros, levels, out, tokens, outputs, width,
    bits: tl.constexpr, group: tl.constexpr,
    block_tokens: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 8 // bits
    part_width: tl.constexpr = group // parts
    groups = tl.cdiv(width, group)
    row = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    column = tl.arange(0, part_width)
    is_row, is_output = row < tokens, output < outputs
    x_row = x + row.to(tl.int64)[:, None] * width
    # Bytes are read as [inputs, outputs].
    pointers = codes + output.to(tl.int64)[None, :] * (groups * part_width) + column[:, None]
    sums = tl.zeros((block_tokens, block_outputs), tl.float32)
    for index in range(groups):
        packed = tl.load(pointers + index * part_width, mask=is_output[None, :], other=0)
        offsets = index * outputs + output
        scale = tl.load(scales + offsets, mask=is_output, other=0).to(tl.float32)[None, :]
        zero = scale
        if zeros is not None:
            zero = tl.load(zeros + offsets, mask=is_output, other=0)[None, :]
        for part in tl.static_range(parts):
            inputs = index * group + part * part_width + column
            mask = is_row[:, None] & (inputs < width)[None, :]
            rows = tl.load(x_row + inputs[None, :], mask=mask, other=0)
            values = _values(
                packed, scale, zero, levels, bits, part, zeros is not None, levels is not None
            )
            sums = tl.dot(rows, values.to(rows.dtype), sums)
    pointers = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    mask = is_row[:, None] & is_output[None, :]
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=mask)


@jit
def _unpack(
    codes, scales, zeros, levels, out, outputs, width,
    bits: tl.constexpr, group: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 8 // bits
    part_width: tl.constexpr = group // parts
    groups = tl.cdiv(width, group)
    output = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    index = tl.program_id(1)
    column = tl.arange(0, part_width)
    is_output = output < outputs
    row = output.to(tl.int64)[:, None]
    pointers = codes + row * (groups * part_width) + index * part_width + column[None, :]
    packed = tl.load(pointers, mask=is_output[:, None], other=0)
    offsets = index * outputs + output
    scale = tl.load(scales + offsets, mask=is_output, other=0).to(tl.float32)[:, None]
    zero = scale
    if zeros is not None:
        zero = tl.load(zeros + offsets, mask=is_output, other=0)[:, None]
    for part in tl.static_range(parts):
        inputs = index * group + part * part_width + column
        values = _values(
            packed, scale, zero, levels, bits, part, zeros is not None, levels is not None
        )
        mask = is_output[:, None] & (inputs < width)[None, :]
        tl.store(out + row * width + inputs[None, :], values.to(out.dtype.element_ty), mask=mask)


@jit
def _multiply_int8(
    x, x_scales, weight, scales, out, tokens, outputs, width,
    block_tokens: tl.constexpr, block_outputs: tl.constexpr, block_inputs: tl.constexpr,
    neighbours: tl.constexpr,
):  # fmt: skip
    # Programs go through `neighbours` blocks of tokens before they take the next outputs.
    row_blocks, column_blocks = tl.cdiv(tokens, block_tokens), tl.cdiv(outputs, block_outputs)
    size = neighbours * column_blocks
    first = tl.program_id(0) // size * neighbours
    height = tl.minimum(row_blocks - first, neighbours)
    within = tl.program_id(0) % size
    row = (first + within % height) * block_tokens + tl.arange(0, block_tokens)
    output = within // height * block_outputs + tl.arange(0, block_outputs)
    is_row, is_output = row < tokens, output < outputs
    column = tl.arange(0, block_inputs)
    x_place = x + row.to(tl.int64)[:, None] * width + column[None, :]
    pointers = weight + output.to(tl.int64)[None, :] * width + column[:, None]
    sums = tl.zeros((block_tokens, block_outputs), tl.int32)
    for start in range(0, width, block_inputs):
        is_input = start + column < width
        rows = tl.load(x_place + start, mask=is_row[:, None] & is_input[None, :], other=0)
        values = tl.load(pointers + start, mask=is_input[:, None] & is_output[None, :], other=0)
        sums = tl.dot(rows, values, sums, out_dtype=tl.int32)
    row_scale = tl.load(x_scales + row, mask=is_row, other=0)[:, None]
    scale = tl.load(scales + output, mask=is_output, other=0)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    mask = is_row[:, None] & is_output[None, :]
    tl.store(
        pointers, (sums.to(tl.float32) * row_scale * scale).to(out.dtype.element_ty), mask=mask
    )
