"""The operators that differ between runtimes: one class a dialect, the same questions.

`ort`: onnxruntime's fused operators (domain com.microsoft).
`standard`: operators of the ONNX standard only (opset 23), for TensorRT, OpenVINO and others.

Rows are right-padded when they get here, so causal attention needs no mask: no real token is
after a padding token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from ...spec import ModelSpec
from .builder import GraphBuilder
from .quantized import Float8Matrix, QuantizedMatrix

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
# The largest magnitude of each kind of codes.
LARGEST = {INT8: 127.0, FLOAT8: 448.0}
# Stands for the largest value of a token of zeros.
TINY = 1e-20
# A dialect's `norm`.
Norm = Callable[[GraphBuilder, ir.Value, ir.Value, float], ir.Value]


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of a batch.

    Attributes:
        lengths: int64 [batch, 1], real tokens of each row, at least 1.
        size: int64 scalar, tokens of the longest row.
        arange: int64 [size], the positions.
        batch: int64 [1], the number of rows.
        past: int64 scalar, tokens before each row that were computed earlier; None where rows
            begin at the beginning.
        short: With a past, whether rows are short, bool scalar: see `SHORT_ROW`.
    """

    lengths: ir.Value
    size: ir.Value
    arange: ir.Value
    batch: ir.Value
    past: ir.Value | None = None
    short: ir.Value | None = None


@dataclass(frozen=True)
class Rows:
    """Tokens' values in 8 bits.

    Attributes:
        codes: [batch, size, n], around the dialect's zero point.
        scales: float32 [batch, size, 1], the largest magnitude of the token by that of a code.
    """

    codes: ir.Value
    scales: ir.Value


class Product(NamedTuple):
    """A product that still lacks a factor for each token: `scales`, float32 [batch, size, 1].

    What follows may not need the factor, or need it only on something smaller.
    """

    value: ir.Value
    scales: ir.Value | None = None


class Heads(NamedTuple):
    """What a layer's attention reads, as its projections give it.

    Attributes:
        q: [batch, size, num_heads * head_dim]. RMSNorm takes any factor of a token away again, so
            none is put on; the same for `k`.
        k: [batch, size, num_kv_heads * head_dim].
        v: The same.
        q_norm: The gains of queries' RMSNorm, [head_dim].
        k_norm: Those of keys.
    """

    q: ir.Value
    k: ir.Value
    v: Product
    q_norm: ir.Value
    k_norm: ir.Value


class LayerPast(NamedTuple):
    """Tokens before every row of a batch, the same ones for all, as a layer sees them.

    Attributes:
        states: The keys and values of all layers, float32 [2 * layers, num_kv_heads, past,
            head_dim].
        indices: int64 [2], where the layer's are.
        kept: int64 [1], tokens of the first row, those before it counted, whose keys and values are
            to be given back.
    """

    states: ir.Value
    indices: ir.Value
    kept: ir.Value


class Dialect(Protocol):
    """How a dialect writes what is not the same everywhere.

    Attributes:
        name: Its name.
        continues: The runtime that its `attention` needs to take a past; None where it takes none.
        opsets: Operator versions by domain.
        ir_version: Of the file.
        requires: The runtime that its graphs need.
    """

    name: str
    continues: str | None
    opsets: dict[str, int]
    ir_version: int
    requires: str

    def rotary(self, g: GraphBuilder, positions: Positions, compute: ir.DataType) -> list[ir.Value]:
        """The batch's values that each layer's `attention` takes, computed once.

        Args:
            g: The graph.
            positions: The batch's.
            compute: The dtype of attention.
        """
        ...

    def cos_sin(
        self, g: GraphBuilder, angles: ir.Value, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of float32 angles, in float32.

        Args:
            g: The graph.
            angles: Of any shape, up to 2^20.
            compute: The dtype of attention.
        """
        ...

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """RMSNorm over the last axis, statistics in fp32."""
        ...

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: Product, weight: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """(RMSNorm(residual + x), residual + x), in the dtype of `residual`.

        What it has rounded of the first already it leaves for `quantize_rows`, under the key that
        `graph.linear` asks for; so does `swiglu`.
        """
        ...

    def swiglu(
        self, g: GraphBuilder, gate: Product, up: ir.Value, width: int, dtype: ir.DataType
    ) -> ir.Value:
        """silu(gate) * up, [batch, size, width] in `dtype`."""
        ...

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Each token's values, float32 [batch, size, width], in 8 bits, with a scale of its own.

        Args:
            g: The graph.
            x: The values.
            width: How many a token has.
            codes: INT8 or FLOAT8E4M3FN, what the weights are.
        """
        ...

    def matmul_rows(
        self,
        g: GraphBuilder,
        rows: Rows,
        matrix: QuantizedMatrix | Float8Matrix,
        compute: ir.DataType,
    ) -> ir.Value:
        """The product of the rows' codes with 8-bit weights, still without the rows' scales.

        Args:
            g: The graph.
            rows: From `quantize_rows`.
            matrix: The weights.
            compute: The dtype of the product.
        """
        ...

    def matmul_groups(self, g: GraphBuilder, x: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """The product, in the dtype of `x`, with weights that are quantized in groups."""
        ...

    def gather_table(self, g: GraphBuilder, ids: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """Rows of a quantized embedding table: [batch, size] to float32 [batch, size, n]."""
        ...

    def attention(
        self,
        g: GraphBuilder,
        spec: ModelSpec,
        heads: Heads,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
        compute: ir.DataType,
        past: LayerPast | None,
    ) -> list[ir.Value]:
        """Norms of queries and keys, their rotary embedding, causal grouped-query attention.

        Args:
            g: The graph.
            spec: The model.
            heads: Queries, keys and values.
            rotary: From `rotary`.
            cache: Cosines and sines, each [past + size, head_dim / 2], in the dtype to rotate in.
            compute: The dtype of attention.
            past: Only where the dialect continues.

        Returns:
            [batch, size, num_heads * head_dim]; with a past also the first row's keys and values,
            each [1, num_kv_heads, kept, head_dim], the keys rotated.
        """
        ...


def attention_scale(spec: ModelSpec) -> float:
    """What scores are multiplied by before the softmax: arXiv:1706.03762, eq. 1."""
    return float(1 / np.sqrt(spec.head_dim))


def number_positions(g: GraphBuilder, positions: Positions, arange: ir.Value) -> ir.Value:
    """Positions of each row: int64 [size] to [batch, size]."""
    size = g.op("Reshape", positions.size, g.constant([1]))
    return g.op("Expand", arange, g.op("Concat", positions.batch, size, axis=0))


def settle(g: GraphBuilder, product: Product) -> ir.Value:
    """The product with its factor."""
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
    """Queries and keys after their RMSNorm, each [batch, size, heads, head_dim], in `dtype`."""

    def normed(x: ir.Value, weight: ir.Value, count: int) -> ir.Value:
        split = g.op("Reshape", x, g.constant([0, 0, count, spec.head_dim]))
        return g.cast(norm(g, split, weight, spec.rms_norm_eps), dtype or FLOAT)

    return (
        normed(heads.q, heads.q_norm, spec.num_heads),
        normed(heads.k, heads.k_norm, spec.num_kv_heads),
    )


def row_scales(g: GraphBuilder, x: ir.Value, codes: ir.DataType) -> ir.Value:
    """The largest magnitude of each token by that of a code: [batch, size, n] to [.., 1]."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    floored = g.op("Max", largest, g.constant(TINY, FLOAT))
    return g.op("Mul", floored, g.constant(1 / LARGEST[codes], FLOAT))
