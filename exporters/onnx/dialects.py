"""The operators that differ between runtimes: one class a dialect, the same four questions.

`ort`: onnxruntime's fused operators (domain com.microsoft).
`standard`: operators of the ONNX standard only (opset 23), for TensorRT, OpenVINO and others.

Rows are right-padded when they get here, so causal attention needs no mask: no real token is
after a padding token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...errors import InputError
from ...spec import ModelSpec
from .builder import GraphBuilder

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of a batch.

    Attributes:
        lengths: int64 [batch, 1], real tokens of each row, at least 1.
        size: int64 scalar, tokens of the longest row.
        arange: int64 [size], the positions.
        batch: int64 [1], the number of rows.
    """

    lengths: ir.Value
    size: ir.Value
    arange: ir.Value
    batch: ir.Value


class Dialect(Protocol):
    """How a dialect writes what is not the same everywhere."""

    name: str
    opsets: dict[str, int]
    ir_version: int
    requires: str

    def rotary(self, g: GraphBuilder, positions: Positions) -> list[ir.Value]:
        """The batch's values that each layer's `attention` takes, computed once."""
        ...

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """RMSNorm over the last axis, statistics in fp32."""
        ...

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """(RMSNorm(residual + x), residual + x)."""
        ...

    def silu_mul(self, g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
        """silu(gate) * up."""
        ...

    def attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
    ) -> ir.Value:
        """Rotary embedding and causal grouped-query attention.

        Args:
            g: The graph.
            spec: The model.
            q: [batch, size, num_heads, head_dim], normed.
            k: [batch, size, num_kv_heads, head_dim], normed.
            v: [batch, size, num_kv_heads * head_dim].
            rotary: From `rotary`.
            cache: Cosines and sines, each [max_position_embeddings, head_dim / 2].

        Returns:
            [batch, size, num_heads * head_dim].
        """
        ...


class OrtDialect:
    """GroupQueryAttention, SkipSimplifiedLayerNormalization and QuickGelu of onnxruntime."""

    name = "ort"
    opsets = {"": 21, MICROSOFT: 1}  # noqa: RUF012 (read only)
    ir_version = 10
    requires = "onnxruntime>=1.23"

    def rotary(self, g: GraphBuilder, positions: Positions) -> list[ir.Value]:
        """seqlens_k (int32 [batch], length - 1) and total_sequence_length (int32 scalar)."""
        last = g.op("Sub", positions.lengths, g.constant(1))
        seqlens_k = g.op("Squeeze", g.cast(last, ir.DataType.INT32), g.constant([1]))
        return [seqlens_k, g.cast(positions.size, ir.DataType.INT32)]

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """SimplifiedLayerNormalization: onnxruntime's RMSNorm, in the ONNX domain."""
        return g.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """SkipSimplifiedLayerNormalization: its fourth output is the sum."""
        normed, _, _, total = g.op_outputs(
            "SkipSimplifiedLayerNormalization",
            residual,
            x,
            weight,
            dtypes=[None, ir.DataType.FLOAT, ir.DataType.FLOAT, None],
            domain=MICROSOFT,
            epsilon=eps,
        )
        return normed, total

    def silu_mul(self, g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
        """QuickGelu at alpha 1 is silu, in one pass."""
        return g.op("Mul", g.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up)

    def attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
    ) -> ir.Value:
        """GroupQueryAttention with an empty past, the rotary embedding inside.

        Nothing reads the keys and values it gives back, but onnxruntime takes its flash kernel only
        if they are asked for, whose memory is linear in the length
        (https://github.com/microsoft/onnxruntime/pull/28962).
        """
        seqlens_k, total = rotary
        attended, _, _ = g.op_outputs(
            "GroupQueryAttention",
            g.op("Reshape", q, g.constant([0, 0, spec.num_heads * spec.head_dim])),
            g.op("Reshape", k, g.constant([0, 0, spec.num_kv_heads * spec.head_dim])),
            v,
            None,
            None,
            seqlens_k,
            total,
            *cache,
            dtypes=[None, None, None],
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=1,
            scale=float(1 / np.sqrt(spec.head_dim)),
        )
        return attended


class StandardDialect:
    """RMSNormalization, RotaryEmbedding and Attention of ONNX opset 23."""

    name = "standard"
    opsets = {"": 23}  # noqa: RUF012 (read only)
    ir_version = 11
    requires = "onnxruntime>=1.23"

    def rotary(self, g: GraphBuilder, positions: Positions) -> list[ir.Value]:
        """position_ids, int64 [batch, size]."""
        size = g.op("Reshape", positions.size, g.constant([1]))
        shape = g.op("Concat", positions.batch, size, axis=0)
        return [g.op("Expand", positions.arange, shape)]

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """RMSNormalization."""
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ir.Value, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """Add, then RMSNormalization."""
        total = g.op("Add", residual, x)
        return self.norm(g, total, weight, eps), total

    def silu_mul(self, g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
        """Gate times its sigmoid, times up."""
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)

    def attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
    ) -> ir.Value:
        """Heads first, as TensorRT's parser takes it; no mask but the causal one."""
        (position_ids,) = rotary

        def heads_first(x: ir.Value) -> ir.Value:
            return g.op("Transpose", x, perm=[0, 2, 1, 3])

        v = g.op("Reshape", v, g.constant([0, 0, spec.num_kv_heads, spec.head_dim]))
        out = g.op(
            "Attention",
            g.op("RotaryEmbedding", heads_first(q), *cache, position_ids),
            g.op("RotaryEmbedding", heads_first(k), *cache, position_ids),
            heads_first(v),
            is_causal=1,
            scale=float(1 / np.sqrt(spec.head_dim)),
        )
        return g.op("Reshape", heads_first(out), g.constant([0, 0, spec.num_heads * spec.head_dim]))


DIALECTS: dict[str, Dialect] = {each.name: each for each in (OrtDialect(), StandardDialect())}


def find_dialect(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in DIALECTS:
        raise InputError(f"dialect should be one of {', '.join(DIALECTS)}, found {name!r}")
    return DIALECTS[name]
