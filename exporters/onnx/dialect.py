"""The operators that differ between runtimes: one class a dialect, the same questions.

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
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
        past: tuple[ir.Value, ir.Value] | None,
    ) -> list[ir.Value]:
        """Rotary embedding and causal grouped-query attention.

        Args:
            g: The graph.
            spec: The model.
            q: [batch, size, num_heads, head_dim], normed, in the dtype to rotate in.
            k: [batch, size, num_kv_heads, head_dim], normed.
            v: [batch, size, num_kv_heads * head_dim], in the dtype of attention.
            rotary: From `rotary`.
            cache: Cosines and sines, each [past + size, head_dim / 2], in the dtype of `q`.
            past: Keys and values of the tokens before, each [batch, num_kv_heads, past, head_dim];
                only where the dialect continues.

        Returns:
            [batch, size, num_heads * head_dim]; with a past also keys and values of all tokens,
            each [batch, num_kv_heads, past + size, head_dim], the keys rotated.
        """
        ...


def attention_scale(spec: ModelSpec) -> float:
    """What scores are multiplied by before the softmax: arXiv:1706.03762, eq. 1."""
    return float(1 / np.sqrt(spec.head_dim))


def number_positions(g: GraphBuilder, positions: Positions, arange: ir.Value) -> ir.Value:
    """Positions of each row: int64 [size] to [batch, size]."""
    size = g.op("Reshape", positions.size, g.constant([1]))
    return g.op("Expand", arange, g.op("Concat", positions.batch, size, axis=0))


def row_scales(g: GraphBuilder, x: ir.Value, codes: ir.DataType) -> ir.Value:
    """The largest magnitude of each token by that of a code: [batch, size, n] to [.., 1]."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    floored = g.op("Max", largest, g.constant(TINY, FLOAT))
    return g.op("Mul", floored, g.constant(1 / LARGEST[codes], FLOAT))
