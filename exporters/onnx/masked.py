"""Attention under a mask, in operators of the ONNX standard, for both dialects.

To both sides, where padding has to be masked, or within a sliding window. Scores of all pairs of
tokens stand in memory at once.
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
    """What attention under a mask needs to know of a batch, computed once.

    Attributes:
        position_ids: int64 [batch, size].
        mask: Which keys each query sees: bool [batch, 1, size, size]; onnxruntime expands heads
            only.
    """

    position_ids: ir.Value
    mask: ir.Value


def describe_sight(g: GraphBuilder, spec: ModelSpec, positions: Positions) -> Sight | None:
    """Positions, and the mask of a model whose attention has one; None where it has none."""
    if not spec.masked_layers:
        return None
    places = g.op("Unsqueeze", positions.arange, g.constant([0]))
    if spec.window is None:
        real = g.op("Less", places, positions.lengths, dtype=BOOL)
        seen = g.op("Unsqueeze", real, g.constant([1, 2]))
    else:
        # Rows begin with their first real token: no padding comes before one.
        queries = g.op("Unsqueeze", positions.arange, g.constant([1]))
        before = g.op("LessOrEqual", places, queries, dtype=BOOL)
        distance = g.op("Sub", queries, places)
        near = g.op("Less", distance, g.constant(spec.window), dtype=BOOL)
        seen = g.op("Unsqueeze", g.op("And", before, near, dtype=BOOL), g.constant([0, 1]))
    size = g.op("Reshape", positions.size, g.constant([1]))
    shape = g.op("Concat", positions.batch, g.constant([1]), size, size, axis=0)
    mask = g.op("Expand", seen, shape)
    return Sight(number_positions(g, positions, positions.arange), mask)


def attend_masked(
    g: GraphBuilder,
    dialect: Dialect,
    spec: ModelSpec,
    heads: Heads,
    sight: Sight,
    cache: tuple[ir.Value, ir.Value],
    compute: ir.DataType,
) -> ir.Value:
    """Norms of queries and keys, their rotary embedding, attention of each token to those it sees.

    Args:
        g: The graph.
        dialect: Its norm.
        spec: The model.
        heads: Queries, keys and values.
        sight: Of `describe_sight`.
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
