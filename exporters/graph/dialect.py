"""The operators that differ between runtimes: one class per dialect, with the same methods.

`standard`: operators of the ONNX standard only (opset 23), for TensorRT, OpenVINO and others.
`ort` (ort_dialect.py): onnxruntime's fused operators (domain com.microsoft).

Rows are right-padded here, so causal attention needs no mask: no real token follows padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from .builder import GraphBuilder
from .initializers import Float8Matrix, QuantizedMatrix

MICROSOFT = "com.microsoft"
BOOL, FLOAT, FLOAT16, BFLOAT16, INT8, UINT8, INT64, FLOAT8 = (
    ir.DataType.BOOL,
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT64,
    ir.DataType.FLOAT8E4M3FN,
)
# The largest code of each dtype.
LARGEST = {INT8: 127.0, FLOAT8: 448.0}
# Lower bound of a token's magnitude: a token of zeros would get a scale of 0.
TINY = 1e-20
# The type of a dialect's `norm`.
Norm = Callable[[GraphBuilder, ir.Value, ir.Value, float], ir.Value]


@dataclass(frozen=True)
class Positions:
    """The values of a batch that attention needs.

    Attributes:
        lengths: int64 [batch, 1], real tokens of each row, at least 1.
        size: int64 scalar, tokens of the longest row.
        arange: int64 [size], the positions.
        batch: int64 [1], the number of rows.
        past: int64 scalar, tokens of the shared prefix; None without one.
        short: bool scalar, with a prefix: whether rows are short, see `SHORT_ROW`.
    """

    lengths: ir.Value
    size: ir.Value
    arange: ir.Value
    batch: ir.Value
    past: ir.Value | None = None
    short: ir.Value | None = None


@dataclass(frozen=True)
class Rows:
    """Activations quantized to 8 bits, with one scale per token.

    Attributes:
        codes: [batch, size, n], around the dialect's zero point.
        scales: float32 [batch, size, 1], the token's largest magnitude / the largest code.
    """

    codes: ir.Value
    scales: ir.Value


class AttentionValues(NamedTuple):
    """The values of a batch that each layer's attention takes, in the order of its inputs.

    Attributes:
        small: bool scalar, whether rows are small enough for attention in one part.
        short: bool scalar, whether rows are short: see `SHORT_ROW`.
        position_ids: int64 [batch, size].
        last: int32 [batch], each row's length less 1; the past counts too.
        total: int32 scalar, the tokens of the longest row, the past included.
        lengths: int32 [batch], with a past: the rows' lengths without it.
    """

    small: ir.Value | None = None
    short: ir.Value | None = None
    position_ids: ir.Value | None = None
    last: ir.Value | None = None
    total: ir.Value | None = None
    lengths: ir.Value | None = None


class ScaledTensor(NamedTuple):
    """A product with a scale per token, float32 [batch, size, 1], that is not applied yet.

    A scale is skipped where the next norm cancels it; otherwise it is applied as late as possible,
    where the tensor is narrower.
    """

    value: ir.Value
    scales: ir.Value | None = None


class Activations(NamedTuple):
    """A projection's input.

    Attributes:
        value: [batch, size, n].
        scales: A scale per token, float32 [batch, size, 1], that is not applied yet; None if there
            is none.
        rows: The value quantized to 8 bits, by the dtype of the codes, as far as an operator has
            done it already.
    """

    value: ir.Value
    scales: ir.Value | None = None
    rows: Mapping[ir.DataType, Rows] = MappingProxyType({})


class Heads(NamedTuple):
    """The inputs of a layer's attention: the outputs of its projections.

    Attributes:
        q: [batch, size, num_heads * head_dim], without scales: the RMSNorm cancels them. The same
            for `k`.
        k: [batch, size, num_kv_heads * head_dim].
        v: [batch, size, num_kv_heads * head_dim].
        q_norm: The gains of the queries' RMSNorm, [head_dim].
        k_norm: The gains of the keys' RMSNorm, [head_dim].
    """

    q: ir.Value
    k: ir.Value
    v: ScaledTensor
    q_norm: ir.Value
    k_norm: ir.Value


class LayerPast(NamedTuple):
    """One layer's view of the prefix that all rows of a batch share.

    Attributes:
        states: The keys and values of all layers, float32 [2 * layers, num_kv_heads, past,
            head_dim].
        indices: int64 [2], the indices of the layer's keys and values.
        kept: int64 [1], tokens of the first row, prefix included, to return keys and values of.
    """

    states: ir.Value
    indices: ir.Value
    kept: ir.Value


def attention_scale(spec: ModelSpec) -> float:
    """1 / sqrt(head_dim), the scores' factor before the softmax: arXiv:1706.03762, eq. 1."""
    return float(1 / np.sqrt(spec.head_dim))


def number_positions(g: GraphBuilder, positions: Positions, arange: ir.Value) -> ir.Value:
    """Repeat the positions for each row: int64 [size] to [batch, size]."""
    size = g.op("Reshape", positions.size, g.constant([1]))
    return g.op("Expand", arange, g.op("Concat", positions.batch, size, axis=0))


def apply_scales(g: GraphBuilder, product: ScaledTensor) -> ir.Value:
    """Apply a product's scales."""
    if product.scales is None:
        return product.value
    return g.op("Mul", g.cast(product.value, FLOAT), product.scales)


def norm_heads(
    g: GraphBuilder,
    norm: Norm,
    spec: ModelSpec,
    heads: Heads,
    dtype: ir.DataType | None,
) -> tuple[ir.Value, ir.Value]:
    """Norm queries and keys: [batch, size, heads, head_dim] each, in `dtype`."""

    def normed(x: ir.Value, weight: ir.Value, count: int) -> ir.Value:
        split = g.op("Reshape", x, g.constant([0, 0, count, spec.head_dim]))
        return g.cast(norm(g, split, weight, spec.rms_norm_eps), dtype or FLOAT)

    return (
        normed(heads.q, heads.q_norm, spec.num_heads),
        normed(heads.k, heads.k_norm, spec.num_kv_heads),
    )


def row_scales(g: GraphBuilder, x: ir.Value, codes: ir.DataType) -> ir.Value:
    """Each token's largest magnitude / the largest code: [batch, size, n] to [.., 1]."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    floored = g.op("Max", largest, g.constant(TINY, FLOAT))
    return g.op("Mul", floored, g.constant(1 / LARGEST[codes], FLOAT))


class Dialect:
    """The dialect `standard`: operators of ONNX opset 23. Others replace what they write otherwise.

    Attributes:
        name: The dialect's name.
        continues: The runtime that `attention` needs to take a past; None if it takes none.
        opsets: Operator versions by domain.
        ir_version: The ONNX file's IR version.
        requires: The runtime that the graphs need.
    """

    name = "standard"
    continues: str | None = None
    opsets = {"": 23}  # noqa: RUF012 (read only)
    ir_version = 11
    requires = "onnxruntime>=1.23"

    def builder(self) -> GraphBuilder:
        """An empty graph in this dialect."""
        return GraphBuilder(self.opsets, self.ir_version)

    def attention_values(
        self, g: GraphBuilder, positions: Positions, compute: ir.DataType
    ) -> AttentionValues:
        """Compute once the values of a batch that each layer's `attention` takes: position_ids.

        Args:
            g: The graph.
            positions: The batch's positions.
            compute: The dtype of attention.
        """
        return AttentionValues(position_ids=number_positions(g, positions, positions.arange))

    def cos_sin(self, g: GraphBuilder, angles: ir.Value, compute: ir.DataType) -> list[ir.Value]:
        """Cosines and sines of float32 angles, in float32.

        Args:
            g: The graph.
            angles: Any shape; values up to 2^20.
            compute: The dtype of attention.
        """
        return [g.op("Cos", angles), g.op("Sin", angles)]

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """RMSNorm over the last axis, statistics in fp32: RMSNormalization."""
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ScaledTensor, weight: ir.Value, eps: float
    ) -> tuple[Activations, ir.Value]:
        """(RMSNorm(residual + x), residual + x), in the dtype of `residual`.

        An operator that also quantizes the norm's output gives `rows`; the same for `swiglu`.
        """
        total = g.op("Add", residual, g.cast(apply_scales(g, x), residual.dtype or FLOAT))
        return Activations(self.norm(g, total, weight, eps)), total

    def swiglu(
        self, g: GraphBuilder, gate: ScaledTensor, up: ir.Value, width: int, dtype: ir.DataType
    ) -> Activations:
        """silu(gate) * up, [batch, size, width] in `dtype`: gate times its sigmoid, times up."""
        x = g.cast(apply_scales(g, gate), dtype)
        silu = g.op("Mul", x, g.op("Sigmoid", x))
        return Activations(g.op("Mul", silu, g.cast(up, dtype)))

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Quantize float32 [batch, size, width] to 8 bits, with one scale per token.

        Rows are divided by their scales first: 8-bit engines need one constant scale.

        Args:
            g: The graph.
            x: The values.
            width: Values per token.
            codes: The weights' dtype, INT8 or FLOAT8E4M3FN.
        """
        scales = row_scales(g, x, codes)
        unit = g.constant(1, FLOAT), g.constant(0, codes)
        return Rows(g.op("QuantizeLinear", g.op("Div", x, scales), *unit, dtype=codes), scales)

    def matmul_rows(
        self,
        g: GraphBuilder,
        rows: Rows,
        matrix: QuantizedMatrix | Float8Matrix,
        compute: ir.DataType,
    ) -> ir.Value:
        """Multiply the rows' codes by 8-bit weights; the rows' scales are not applied.

        MatMul of two DequantizeLinear: engines turn this pattern into an 8-bit product.

        Args:
            g: The graph.
            rows: From `quantize_rows`.
            matrix: The weights.
            compute: The dtype of the product.
        """
        codes = rows.codes.dtype or INT8
        weights = g.op(
            "DequantizeLinear",
            g.initializer(matrix.codes_transposed()),
            g.initializer(matrix.scales_flat(compute)),
            dtype=compute,
            axis=1,
        )
        unit = g.constant(1, compute), g.constant(0, codes)
        values = g.op("DequantizeLinear", rows.codes, *unit, dtype=compute)
        return g.op("MatMul", values, weights)

    def matmul_groups(self, g: GraphBuilder, x: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """Multiply by weights that are quantized in groups; the product has the dtype of `x`.

        MatMul with a blocked DequantizeLinear.
        """
        weights = g.op(
            "DequantizeLinear",
            g.initializer(matrix.codes_transposed()),
            g.initializer(matrix.scales_transposed(x.dtype or FLOAT)),
            dtype=x.dtype,
            axis=0,
            block_size=matrix.scheme.group_size,
        )
        return g.op("MatMul", x, weights)

    def gather_table(self, g: GraphBuilder, ids: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """Look up rows of a quantized embedding table: [batch, size] to float32 [.., n].

        Codes and scales are multiplied group by group.
        """
        codes = g.initializer(matrix.codes_signed())
        rows = g.cast(g.op("Gather", codes, ids, axis=0), FLOAT)
        scales = g.op("Gather", g.initializer(matrix.scales(FLOAT)), ids, axis=0)
        groups = g.op("Reshape", rows, g.constant([0, 0, matrix.groups, -1]))
        values = g.op("Mul", groups, g.op("Unsqueeze", scales, g.constant([3])))
        return g.op("Reshape", values, g.constant([0, 0, matrix.shape[1]]))

    def attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        heads: Heads,
        values: AttentionValues,
        cache: tuple[ir.Value, ir.Value],
        compute: ir.DataType,
        past: LayerPast | None,
    ) -> list[ir.Value]:
        """Norm and rotate queries and keys, then causal grouped-query attention.

        Args:
            g: The graph.
            spec: The model.
            heads: Queries, keys and values.
            values: From `attention_values`.
            cache: Cosines and sines, each [past + size, head_dim / 2], in the dtype to rotate in.
            compute: The dtype of attention.
            past: The shared prefix; only in a dialect that `continues`.

        Returns:
            [batch, size, num_heads * head_dim]; with a past also the first row's rotated keys and
            its values, each [1, num_kv_heads, kept, head_dim].
        """
        assert past is None
        return [self.plain_attention(g, spec, heads, values.position_ids, cache, compute)]

    def plain_attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        heads: Heads,
        position_ids: ir.Value | None,
        cache: tuple[ir.Value, ir.Value],
        compute: ir.DataType,
        mask: ir.Value | None = None,
    ) -> ir.Value:
        """Norm and rotate queries and keys, then the standard's Attention.

        Heads come first, as TensorRT's parser takes them.

        Args:
            g: The graph.
            spec: The model.
            heads: Queries, keys and values.
            position_ids: int64 [batch, size].
            cache: Cosines and sines, each [size, head_dim / 2], in the dtype to rotate in.
            compute: The dtype of attention.
            mask: bool [batch, 1, size, size], true for the keys that a query sees; None for all
                keys up to the query's own position.

        Returns:
            [batch, size, num_heads * head_dim].
        """

        def heads_first(x: ir.Value) -> ir.Value:
            return g.op("Transpose", x, perm=[0, 2, 1, 3])

        def rotated(x: ir.Value) -> ir.Value:
            return g.cast(g.op("RotaryEmbedding", heads_first(x), *cache, position_ids), compute)

        q, k = norm_heads(g, self.norm, spec, heads, cache[0].dtype)
        v = g.cast(apply_scales(g, heads.v), compute)
        v = heads_first(g.op("Reshape", v, g.constant([0, 0, spec.num_kv_heads, spec.head_dim])))
        inputs, scale = (rotated(q), rotated(k), v), attention_scale(spec)
        if mask is None:
            attended = g.op("Attention", *inputs, is_causal=1, scale=scale)
        else:
            attended = g.op("Attention", *inputs, mask, scale=scale)
        width = spec.num_heads * spec.head_dim
        return g.op("Reshape", heads_first(attended), g.constant([0, 0, width]))
