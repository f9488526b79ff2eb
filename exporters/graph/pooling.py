"""Pooling and the modules after it, in a graph; `checkpoint.pooling` has them in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...checkpoint.pipeline import Dense, Outputs, PoolingMode
from ...checkpoint.pooling import FEWEST, SHORTEST, read_dense
from .builder import GraphBuilder
from .dialect import BOOL, FLOAT, INT64, Positions
from .tensors import lazy_tensor

# Excluded tokens get the lowest float32 value: the verification would refuse an infinity.
LOWEST = float(np.finfo(np.float32).min)


def pool(
    g: GraphBuilder,
    states: ir.Value,
    positions: Positions,
    outputs: Outputs,
    prompt_length: ir.Value | None,
) -> ir.Value:
    """Pool each text to one vector: float32 [batch, size, n] to [batch, n * poolings].

    Rows begin with their first real token.

    Args:
        g: The graph.
        states: All tokens' states after the final norm.
        positions: The batch's positions.
        outputs: How to pool.
        prompt_length: int64 [1], tokens at a row's beginning to exclude.
    """
    places = g.op("Unsqueeze", positions.arange, g.constant([0]))
    real = g.op("Less", places, positions.lengths, dtype=BOOL)
    if prompt_length is not None:
        after = g.op("GreaterOrEqual", places, prompt_length, dtype=BOOL)
        real = g.op("And", real, after)
    pooled = [_pool_by(g, mode, states, real, places) for mode in outputs.pooling]
    return pooled[0] if len(pooled) == 1 else g.op("Concat", *pooled, axis=1)


def _pool_by(
    g: GraphBuilder, mode: PoolingMode, states: ir.Value, real: ir.Value, places: ir.Value
) -> ir.Value:
    """One pooling, float32 [batch, n].

    Args:
        g: The graph.
        mode: How to pool.
        states: float32 [batch, size, n].
        real: bool [batch, size], the tokens to pool.
        places: int64 [1, size], the tokens' places in their row.
    """
    match mode:
        case "cls":
            index = g.op("ArgMax", g.cast(real, INT64), axis=1, keepdims=1)
            return g.op("GatherND", states, index, batch_dims=1)
        case "lasttoken":
            marked = g.op("Mul", g.cast(real, INT64), places)
            index = g.op("ReduceMax", marked, g.constant([1]), keepdims=1)
            return g.op("GatherND", states, index, batch_dims=1)
        case "max":
            masked = _masked(g, states, real, LOWEST)
            return g.op("ReduceMax", masked, g.constant([1]), keepdims=0)
        case "weightedmean":
            numbers = g.cast(g.op("Add", places, g.constant(1)), FLOAT)
            weights = g.op("Mul", g.cast(real, FLOAT), numbers)
        case _:
            weights = g.cast(real, FLOAT)
    # A weight of zero would not exclude a token: zero times infinity is NaN.
    masked = _masked(g, states, real, 0)
    rows = g.op("MatMul", g.op("Unsqueeze", weights, g.constant([1])), masked)
    pooled = g.op("Squeeze", rows, g.constant([1]))
    total = g.op("ReduceSum", weights, g.constant([1]), keepdims=1)
    total = g.op("Max", total, g.constant(FEWEST, FLOAT))
    if mode == "mean_sqrt_len_tokens":
        total = g.op("Sqrt", total)
    return g.op("Div", pooled, total)


def _masked(g: GraphBuilder, states: ir.Value, real: ir.Value, value: float) -> ir.Value:
    """The states with a value in place of the tokens that are not pooled."""
    mask = g.op("Unsqueeze", real, g.constant([2]))
    return g.op("Where", mask, states, g.constant(value, FLOAT), dtype=FLOAT)


def describe_steps(g: GraphBuilder, vectors: ir.Value, outputs: Outputs, folder: Path) -> ir.Value:
    """Add the modules after pooling: float32 [batch, width] to [batch, dim].

    Args:
        g: The graph.
        vectors: The pooled vectors.
        outputs: The modules.
        folder: The folder with the Dense modules' tensors.
    """
    for step in outputs.steps:
        if isinstance(step, Dense):
            vectors = _multiply(g, vectors, step, folder)
        else:
            vectors = normalize(g, vectors)
    return vectors if outputs.truncate is None else shorten(g, vectors, outputs.truncate)


def normalize(g: GraphBuilder, vectors: ir.Value) -> ir.Value:
    """Scale vectors to length 1: float32 [batch, dim]."""
    length = g.op("ReduceL2", vectors, g.constant([1]), keepdims=1)
    return g.op("Div", vectors, g.op("Max", length, g.constant(SHORTEST, FLOAT)))


def shorten(g: GraphBuilder, vectors: ir.Value, dim: int) -> ir.Value:
    """The first `dim` values of each vector."""
    return g.op("Slice", vectors, g.constant([0]), g.constant([dim]), g.constant([1]))


def _multiply(g: GraphBuilder, x: ir.Value, dense: Dense, folder: Path) -> ir.Value:
    def weight(part: str) -> ir.Value:
        size = (dense.in_features, dense.out_features)
        shape = size if part != "bias" else size[1:]
        # The parts are named like the attributes of DenseWeights.
        tensor = lazy_tensor(
            f"{dense.path}.{part}", lambda: getattr(read_dense(folder, dense), part).T, FLOAT, shape
        )
        return g.initializer(tensor)

    y = g.op("MatMul", x, weight("weight"))
    if dense.bias:
        y = g.op("Add", y, weight("bias"))
    y = _ACTIVATIONS[dense.activation](g, y)
    if not dense.residual:
        return y
    if dense.in_features != dense.out_features:
        x = g.op("MatMul", x, weight("residual"))
    return g.op("Add", y, x)


_ACTIVATIONS: Mapping[str, Callable[[GraphBuilder, ir.Value], ir.Value]] = {
    "Identity": lambda g, x: x,
    "Tanh": lambda g, x: g.op("Tanh", x),
    "ReLU": lambda g, x: g.op("Relu", x),
    "GELU": lambda g, x: g.op("Gelu", x),
    "Sigmoid": lambda g, x: g.op("Sigmoid", x),
    "SiLU": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
}
