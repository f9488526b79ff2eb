"""Attention to both sides, in operators of the ONNX standard, for both dialects.

Tokens see those behind them, so padding has to be masked; scores of all pairs of tokens stand in
memory at once.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...spec import ModelSpec
from .builder import GraphBuilder
from .dialect import (
    BOOL,
    Dialect,
    Heads,
    Positions,
    attention_scale,
    norm_heads,
    number_positions,
    settle,
)


class Sight(NamedTuple):
    """What attention to both sides needs to know of a batch, computed once.

    Attributes:
        position_ids: int64 [batch, size].
        mask: Which keys each query sees: bool [batch, 1, size, size]; onnxruntime expands heads
            only.
    """

    position_ids: ir.Value
    mask: ir.Value


def see_both_ways(g: GraphBuilder, positions: Positions) -> Sight:
    """Positions, and the mask of padding."""
    places = g.op("Unsqueeze", positions.arange, g.constant([0]))
    real = g.op("Less", places, positions.lengths, dtype=BOOL)
    size = g.op("Reshape", positions.size, g.constant([1]))
    shape = g.op("Concat", positions.batch, g.constant([1]), size, size, axis=0)
    mask = g.op("Expand", g.op("Unsqueeze", real, g.constant([1, 2])), shape)
    return Sight(number_positions(g, positions, positions.arange), mask)


def attend_both_ways(
    g: GraphBuilder,
    dialect: Dialect,
    spec: ModelSpec,
    heads: Heads,
    sight: Sight,
    cache: tuple[ir.Value, ir.Value],
    compute: ir.DataType,
) -> ir.Value:
    """Norms of queries and keys, their rotary embedding, attention of each token to all real ones.

    Args:
        g: The graph.
        dialect: Its norm.
        spec: The model.
        heads: Queries, keys and values.
        sight: Of `see_both_ways`.
        cache: Cosines and sines, each [size, head_dim / 2], in the dtype to rotate in.
        compute: The dtype of attention.

    Returns:
        [batch, size, num_heads * head_dim].
    """

    def heads_first(x: ir.Value) -> ir.Value:
        return g.op("Transpose", x, perm=[0, 2, 1, 3])

    def rotated(x: ir.Value) -> ir.Value:
        return g.cast(g.op("RotaryEmbedding", heads_first(x), *cache, sight.position_ids), compute)

    q, k = norm_heads(g, dialect.norm, spec, heads, cache[0].dtype)
    v = g.cast(settle(g, heads.v), compute)
    values = heads_first(g.op("Reshape", v, g.constant([0, 0, spec.num_kv_heads, spec.head_dim])))
    scale = attention_scale(spec)
    attended = g.op("Attention", rotated(q), rotated(k), values, sight.mask, scale=scale)
    width = spec.num_heads * spec.head_dim
    return g.op("Reshape", heads_first(attended), g.constant([0, 0, width]))
