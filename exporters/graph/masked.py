"""The mask of attention that is bidirectional, where padding is masked, or in a sliding window.

Both dialects then run the standard's Attention: the scores of all pairs of tokens are in memory at
once.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from .builder import GraphBuilder
from .dialect import BOOL, Positions, number_positions


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
