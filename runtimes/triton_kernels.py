"""Triton kernels for the steps between a layer's matrices, each a single pass over memory.

Everything is computed in fp32 and rounded once, when it is stored. A row is a token. If the next
matrix is fp8 or int8, its input is rounded in the same pass, with one scale per token.
"""

# ruff: noqa: ANN001, ANN202 - the Triton compiler gives a kernel's arguments their types.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Any, for the type checker: triton.jit does not return a function.
jit: Any = triton.jit
E4M3 = torch.float8_e4m3fn
# The largest code of dtypes that come with scales.
LARGEST = {E4M3: 448.0, torch.int8: 127.0}
# Adding it to a small fp32 number and taking it away rounds to an integer, halves to even.
ROUNDING = tl.constexpr(1.5 * 2**23)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny * 1e3)


@dataclass(frozen=True)
class Rows:
    """A matrix's input: values [tokens, width]; for fp8, int8 also scales, float32 [tokens, 1]."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def add_norm(
    states: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Rows:
    """Add `delta` to the residual stream in place, then compute its RMSNorm.

    Args:
        states: float32 [tokens, width], contiguous.
        delta: [tokens, width], contiguous; None adds nothing.
        weight: [width].
        eps: Added to the mean square.
        dtype: The result's dtype; float8_e4m3fn and int8 come with scales.

    Returns:
        x / sqrt(mean(x**2) + eps) * weight (RMSNorm, arXiv:1910.07467).
    """
    tokens, width = states.shape
    rows = _empty_rows(states, width, dtype)
    added = states if delta is None else delta
    arguments = (states, added, weight, rows.values, rows.scales, width, eps)
    constants = {"add": delta is not None, "largest": LARGEST.get(dtype, 0.0)}
    _launch(_add_norm, tokens, *arguments, **constants, block=power_of_two(width))
    return rows


def norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads: tuple[int, int],
    eps: float,
) -> None:
    """RMSNorm of every query and key head, then the rotary embedding, in place.

    Halves (a, b) of a head become (a cos - b sin, b cos + a sin), as in transformers' Qwen3
    (rotary embedding: arXiv:2104.09864).

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim], contiguous: queries, keys, values.
        q_weight: [head_dim].
        k_weight: [head_dim].
        cos: float32 [positions, head_dim / 2].
        sin: As `cos`.
        positions: int32 [tokens].
        heads: (heads, kv_heads).
        eps: Added to the mean square.
    """
    tokens, width = qkv.shape
    half, rotated = cos.shape[1], sum(heads)
    _launch(
        _norm_rope,
        tokens,
        *(qkv, q_weight, k_weight, cos, sin, positions, width, eps),
        heads=heads[0],
        rotated=rotated,
        half=half,
        block_heads=power_of_two(rotated),
        block=power_of_two(half),
    )


def silu_mul(gate_up: torch.Tensor, dtype: torch.dtype) -> Rows:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202).

    Args:
        gate_up: [tokens, 2 * width], contiguous: gates, then ups.
        dtype: The result's dtype; float8_e4m3fn and int8 come with scales.

    Returns:
        [tokens, width].
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    rows = _empty_rows(gate_up, width, dtype)
    arguments = (gate_up, rows.values, rows.scales, width)
    largest = LARGEST.get(dtype, 0.0)
    _launch(_silu_mul, tokens, *arguments, largest=largest, block=power_of_two(width))
    return rows


def round_rows(values: torch.Tensor, dtype: torch.dtype) -> Rows:
    """Round each row of `values` [tokens, width], contiguous, if `dtype` comes with scales.

    A row's scale is max|x| / 448 for float8_e4m3fn, max|x| / 127 for int8.
    """
    if dtype not in LARGEST:
        return Rows(values)
    tokens, width = values.shape
    rows = _empty_rows(values, width, dtype)
    arguments = (values, rows.values, rows.scales, width)
    _launch(_round, tokens, *arguments, largest=LARGEST[dtype], block=power_of_two(width))
    return rows


def _empty_rows(like: torch.Tensor, width: int, dtype: torch.dtype) -> Rows:
    tokens, device = len(like), like.device
    scales = None
    if dtype in LARGEST:
        scales = torch.empty((tokens, 1), dtype=torch.float32, device=device)
    return Rows(torch.empty((tokens, width), dtype=dtype, device=device), scales)


def _launch(kernel: Any, tokens: int, *arguments: Any, block: int, **constants: Any) -> None:
    """Run a kernel once per token, with 16 values per thread, in 1 to 16 warps."""
    values = block * constants.get("block_heads", 1)
    constants |= {"num_warps": min(max(values // 512, 1), 16), "enable_fp_fusion": True}
    kernel[(tokens,)](*arguments, block=block, **constants)


def power_of_two(width: int) -> int:
    """The next power of two: Triton requires it for block sizes."""
    return 1 << (width - 1).bit_length()


@jit
def _store(values, out, scales, row, columns, width, mask, largest: tl.constexpr):
    if largest > 0:
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), TINY) / largest
        tl.store(scales + row, scale)
        values = tl.minimum(tl.maximum(values / scale, -largest), largest)
        if out.dtype.element_ty == tl.int8:
            values = (values + ROUNDING) - ROUNDING
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=mask)


@jit
def _add_norm(
    states, delta, weight, out, scales, width, eps,
    add: tl.constexpr, largest: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    offsets = row * width + columns
    values = tl.load(states + offsets, mask=mask, other=0.0)
    if add:
        values += tl.load(delta + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(states + offsets, values, mask=mask)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    gains = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    _store(values * factor * gains, out, scales, row, columns, width, mask, largest)


@jit
def _norm_rope(
    qkv, q_weight, k_weight, cos, sin, positions, width, eps,
    heads: tl.constexpr, rotated: tl.constexpr, half: tl.constexpr,
    block_heads: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, block_heads)[:, None]
    columns = tl.arange(0, block)[None, :]
    inside = columns < half
    mask = (head < rotated) & inside
    pointers = qkv + row * width + head * (2 * half) + columns
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + half, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1) / (2 * half)
    factor = tl.rsqrt(squares + eps)[:, None]
    query = head < heads
    q_first = tl.load(q_weight + columns, mask=inside, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight + columns, mask=inside, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight + half + columns, mask=inside, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight + half + columns, mask=inside, other=0.0).to(tl.float32)
    first *= factor * tl.where(query, q_first, k_first)
    second *= factor * tl.where(query, q_second, k_second)
    angle = tl.load(positions + row) * half + columns
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    kind = qkv.dtype.element_ty
    tl.store(pointers, (first * c - second * s).to(kind), mask=mask)
    tl.store(pointers + half, (second * c + first * s).to(kind), mask=mask)


@jit
def _silu_mul(gate_up, out, scales, width, largest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    pointers = gate_up + row * 2 * width + columns
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + width, mask=mask, other=0.0).to(tl.float32)
    _store(gate * tl.sigmoid(gate) * up, out, scales, row, columns, width, mask, largest)


@jit
def _round(values, out, scales, width, largest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    inputs = tl.load(values + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    _store(inputs, out, scales, row, columns, width, mask, largest)
