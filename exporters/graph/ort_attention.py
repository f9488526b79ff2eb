"""Attention in onnxruntime's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from .builder import GraphBuilder
from .dialect import (
    BFLOAT16,
    FLOAT,
    INT64,
    MICROSOFT,
    AttentionValues,
    Heads,
    LayerPast,
    Norm,
    ScaledTensor,
    apply_scales,
    attention_scale,
    norm_heads,
)

# Parts that a longer row's attention is computed in.
PARTS = 4
# Queries, keys and values, [batch, size, heads * head_dim] each.
Inputs = tuple[ir.Value, ir.Value, ir.Value]


class KernelInputs(NamedTuple):
    """The inputs of the function RotaryAttention, which its kernel reads by position.

    The order is that of `Heads` (the scales of `v` after it), the cache, `AttentionValues` and
    `LayerPast`; `enum` in runtimes/kernels/register.c repeats it.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    v_scales: ir.Value
    q_norm: ir.Value
    k_norm: ir.Value
    cosines: ir.Value
    sines: ir.Value
    small: ir.Value
    short: ir.Value
    position_ids: ir.Value
    last: ir.Value
    total: ir.Value
    lengths: ir.Value | None = None
    states: ir.Value | None = None
    indices: ir.Value | None = None
    kept: ir.Value | None = None


def fused(
    g: GraphBuilder,
    norm: Norm,
    spec: ModelSpec,
    heads: Heads,
    values: AttentionValues,
    cache: tuple[ir.Value, ir.Value],
    compute: ir.DataType,
) -> ir.Value:
    """GroupQueryAttention; in bf16, queries and keys are rotated before it, in fp16.

    Args:
        g: The graph.
        norm: The dialect's norm.
        spec: The model.
        heads: Queries, keys and values.
        values: From the dialect's `attention_values`.
        cache: Cosines and sines.
        compute: The dtype of attention.
    """
    rows = _rows(g, norm, spec, heads, cache[0].dtype, compute)
    if compute != BFLOAT16:
        return _fused_attention(g, spec, rows, values, cache, None)[0]
    rotated = _rotate(g, spec, rows, values.position_ids, cache)
    return _fused_attention(g, spec, rotated, values, None, None)[0]


def chosen_by_length(
    g: GraphBuilder, norm: Norm, spec: ModelSpec, *parameters: ir.Value
) -> list[ir.Value]:
    """Attention in fp32, as a function: onnxruntime's fastest CPU operator for the rows' length.

    Short rows use the standard's Attention, which is faster there than GroupQueryAttention
    (docs/benchmarks.md). Small rows are computed in one part, others in several, which computes
    fewer of the scores that the causal mask discards.

    Args:
        g: The function.
        norm: The dialect's norm.
        spec: The model.
        parameters: The values of `KernelInputs`; the last four only with a past.
    """
    x = KernelInputs(*parameters)
    heads = Heads(x.q, x.k, ScaledTensor(x.v, x.v_scales), x.q_norm, x.k_norm)
    rows = _rows(g, norm, spec, heads, FLOAT, FLOAT)
    values = AttentionValues(x.small, x.short, x.position_ids, x.last, x.total, x.lengths)
    cache, past = (x.cosines, x.sines), None
    if x.states is not None and x.indices is not None and x.kept is not None:
        past = _for_each_row(g, LayerPast(x.states, x.indices, x.kept), x.q)

    def in_parts(parts: int) -> list[ir.Value]:
        rotated = _rotate(g, spec, rows, x.position_ids, cache)
        return _plain_attention(g, spec, rotated, past, parts)

    attended, *states = g.choose(
        x.small,
        lambda: in_parts(1),
        lambda: g.choose(
            x.short,
            lambda: in_parts(PARTS),
            lambda: _fused_attention(g, spec, rows, values, cache, past),
        ),
    )
    if x.kept is None:
        return [attended]
    ends = g.op("Concat", g.constant([1]), x.kept, axis=0)
    first_row = [g.op("Slice", x, g.constant([0, 0]), ends, g.constant([0, 2])) for x in states]
    return [attended, *first_row]


def _for_each_row(g: GraphBuilder, past: LayerPast, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Repeat the layer's prefix per row: keys, values, [batch, num_kv_heads, past, head_dim]."""
    batch = g.op("Slice", g.op("Shape", rows, dtype=INT64), g.constant([0]), g.constant([1]))
    shape = g.op("Concat", batch, g.constant([1, 1, 1]), axis=0)
    states = g.op("Gather", past.states, past.indices, axis=0)
    keys, values = g.op_outputs("Split", states, dtypes=[FLOAT] * 2, axis=0, num_outputs=2)
    return g.op("Expand", keys, shape), g.op("Expand", values, shape)


def _rows(
    g: GraphBuilder,
    norm: Norm,
    spec: ModelSpec,
    heads: Heads,
    rotary: ir.DataType | None,
    compute: ir.DataType,
) -> Inputs:
    """Queries and keys after their norms, in the dtype to rotate in, and values."""
    q, k = norm_heads(g, norm, spec, heads, rotary)
    queries = g.op("Reshape", q, g.constant([0, 0, spec.num_heads * spec.head_dim]))
    keys = g.op("Reshape", k, g.constant([0, 0, spec.num_kv_heads * spec.head_dim]))
    return queries, keys, g.cast(apply_scales(g, heads.v), compute)


def _rotate(
    g: GraphBuilder,
    spec: ModelSpec,
    rows: Inputs,
    position_ids: ir.Value | None,
    cache: tuple[ir.Value, ir.Value],
) -> Inputs:
    """Rotate queries and keys, and cast them to the values' dtype."""
    queries, keys, values = rows

    def turn(x: ir.Value, heads: int) -> ir.Value:
        inputs = (x, position_ids, *cache)
        rotated = g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=heads)
        return g.cast(rotated, values.dtype or FLOAT)

    return turn(queries, spec.num_heads), turn(keys, spec.num_kv_heads), values


def _fused_attention(
    g: GraphBuilder,
    spec: ModelSpec,
    inputs: Inputs,
    counts: AttentionValues,
    cache: tuple[ir.Value, ir.Value] | None,
    past: tuple[ir.Value, ir.Value] | None,
) -> list[ir.Value]:
    """GroupQueryAttention; it applies the rotary embedding if it gets the cache.

    Without a past nothing reads the keys and values it returns. They are requested because
    onnxruntime uses its flash kernel, with memory linear in the length, only then
    (https://github.com/microsoft/onnxruntime/pull/28962).
    """
    queries, keys, values = inputs
    # Before 1.31, values of unknown shape count as missing, and the queries as packed QKV.
    values = g.op("Reshape", values, g.constant([0, 0, spec.num_kv_heads * spec.head_dim]))
    # position_ids, attention_bias, head_sink, the keys' scales and norms are not given.
    query_seqlens = [] if counts.lengths is None else [*[None] * 7, counts.lengths]
    outputs = g.op_outputs(
        "GroupQueryAttention",
        queries,
        keys,
        values,
        *(past or (None, None)),
        counts.last,
        counts.total,
        *(cache or (None, None)),
        *query_seqlens,
        dtypes=[None, None, None],
        domain=MICROSOFT,
        num_heads=spec.num_heads,
        kv_num_heads=spec.num_kv_heads,
        do_rotary=int(cache is not None),
        scale=attention_scale(spec),
    )
    return outputs[:1] if past is None else outputs


def _plain_attention(
    g: GraphBuilder,
    spec: ModelSpec,
    rows: Inputs,
    past: tuple[ir.Value, ir.Value] | None,
    parts: int,
) -> list[ir.Value]:
    """The standard's Attention; all scores of one part of a row are in memory at once.

    Each part continues the keys and values of the parts before it.
    """

    def attend(rows: Sequence[ir.Value], past: Sequence[ir.Value], outputs: int) -> list[ir.Value]:
        return g.op_outputs(
            "Attention",
            *rows,
            *([None, *past] if past else []),
            dtypes=[None] * outputs,
            is_causal=1,
            q_num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=attention_scale(spec),
        )

    states, outputs = past or (), 1 if past is None else 3
    if parts == 1:
        return attend(rows, states, outputs)
    attended = []
    cut = [g.op_outputs("Split", x, dtypes=[None] * parts, axis=1, num_outputs=parts) for x in rows]
    for part in zip(*cut, strict=True):
        result, *states = attend(part, states, 3)
        attended.append(result)
    return [g.op("Concat", *attended, axis=1), *states][:outputs]
