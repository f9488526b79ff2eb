"""Masked attention in operators of the ONNX standard, for both dialects.

It is bidirectional, where padding must be masked, or within a sliding window. The scores of all
pairs of tokens are in memory at once.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from .builder import GraphBuilder
from .dialect import (
    BOOL,
    Dialect,
    Heads,
    Positions,
    apply_scales,
    attention_scale,
    norm_heads,
    number_positions,
)


class Sight(NamedTuple):
    """The values of a batch that masked attention needs, computed once.

    Attributes:
        position_ids: int64 [batch, size].
        mask: bool [batch, 1, size, size], true for the keys that a query sees. onnxruntime
            broadcasts over heads only.
    """

    position_ids: ir.Value
    mask: ir.Value


def describe_sight(g: GraphBuilder, spec: ModelSpec, positions: Positions) -> Sight | None:
    """Compute positions and the attention mask; None for a model without one."""
    if not spec.masked_layers:
        return None
    keys = g.op("Unsqueeze", positions.arange, g.constant([0]))
    if spec.window is None:
        real = g.op("Less", keys, positions.lengths, dtype=BOOL)
        seen = g.op("Unsqueeze", real, g.constant([1, 2]))
    else:
        # Rows begin with their first real token: the causal mask excludes padding.
        queries = g.op("Unsqueeze", positions.arange, g.constant([1]))
        before = g.op("LessOrEqual", keys, queries, dtype=BOOL)
        distance = g.op("Sub", queries, keys)
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
    """Norm and rotate queries and keys, then attention of each token to those that it sees.

    Args:
        g: The graph.
        dialect: Provides the norm.
        spec: The model.
        heads: Queries, keys and values.
        sight: From `describe_sight`.
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
    v = g.cast(apply_scales(g, heads.v), compute)
    values = heads_first(g.op("Reshape", v, g.constant([0, 0, spec.num_kv_heads, spec.head_dim])))
    scale = attention_scale(spec)
    attended = g.op("Attention", rotated(q), rotated(k), values, sight.mask, scale=scale)
    width = spec.num_heads * spec.head_dim
    return g.op("Reshape", heads_first(attended), g.constant([0, 0, width]))
