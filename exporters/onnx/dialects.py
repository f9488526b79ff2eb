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
from .quantized import Float8Matrix, QuantizedMatrix

MICROSOFT = "com.microsoft"
FLOAT, INT8, UINT8, INT64, FLOAT8 = (
    ir.DataType.FLOAT,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT64,
    ir.DataType.FLOAT8E4M3FN,
)
ZERO_POINT = 128
# The largest magnitude of each kind of codes.
LARGEST = {INT8: 127.0, FLOAT8: 448.0}
# Stands for the largest value of a token of zeros.
TINY = 1e-20
# MatMulNBits computes in int8 with a scale a block of a token's activations.
ACCURACY_LEVEL = 4


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
    """

    lengths: ir.Value
    size: ir.Value
    arange: ir.Value
    batch: ir.Value
    past: ir.Value | None = None


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
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Rotary embedding and causal grouped-query attention.

        Args:
            g: The graph.
            spec: The model.
            q: [batch, size, num_heads, head_dim], normed.
            k: [batch, size, num_kv_heads, head_dim], normed.
            v: [batch, size, num_kv_heads * head_dim].
            rotary: From `rotary`.
            cache: Cosines and sines, each [past + size, head_dim / 2].
            past: Keys and values of the tokens before, each [batch, num_kv_heads, past, head_dim];
                only where the dialect continues.

        Returns:
            [batch, size, num_heads * head_dim]; keys and values of all tokens, each
            [batch, num_kv_heads, past + size, head_dim], the keys rotated.
        """
        ...


class OrtDialect:
    """GroupQueryAttention, SkipSimplifiedLayerNormalization and QuickGelu of onnxruntime."""

    name = "ort"
    # The input query_seqlens, without which a past goes with one row only.
    continues: str | None = "onnxruntime>=1.32"
    opsets = {"": 21, MICROSOFT: 1}  # noqa: RUF012 (read only)
    ir_version = 10
    requires = "onnxruntime>=1.23"

    def rotary(self, g: GraphBuilder, positions: Positions) -> list[ir.Value]:
        """seqlens_k (int32 [batch], length - 1) and total_sequence_length (int32 scalar).

        With a past, both count it too, and query_seqlens (int32 [batch]) are the rows' lengths.
        """
        last, total = g.op("Sub", positions.lengths, g.constant(1)), positions.size
        if positions.past is not None:
            last, total = (g.op("Add", count, positions.past) for count in (last, total))

        def a_row(count: ir.Value) -> ir.Value:
            return g.op("Squeeze", g.cast(count, ir.DataType.INT32), g.constant([1]))

        counts = [a_row(last), g.cast(total, ir.DataType.INT32)]
        return counts if positions.past is None else [*counts, a_row(positions.lengths)]

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

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Uint8 around 128, which onnxruntime multiplies thirty times as fast as int8 on x86.

        A block of QuantizeLinear is a token: one pass, and no division before it.
        """
        scales = row_scales(g, x, codes)
        shape = g.op("Shape", scales, dtype=INT64)
        zero_points = g.op("Expand", g.constant(ZERO_POINT, UINT8), shape)
        values = g.op(
            "QuantizeLinear", x, scales, zero_points, dtype=UINT8, axis=-1, block_size=width
        )
        return Rows(values, scales)

    def matmul_rows(
        self,
        g: GraphBuilder,
        rows: Rows,
        matrix: QuantizedMatrix | Float8Matrix,
        compute: ir.DataType,
    ) -> ir.Value:
        """MatMulIntegerToFloat, at a scale of one for all rows; CPUs only, and in fp32."""
        return g.op(
            "MatMulIntegerToFloat",
            rows.codes,
            g.initializer(matrix.codes_transposed()),
            g.constant(1, FLOAT),
            g.initializer(matrix.scales_flat(FLOAT)),
            g.constant(ZERO_POINT, UINT8),
            dtype=FLOAT,
            domain=MICROSOFT,
        )

    def matmul_groups(self, g: GraphBuilder, x: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """MatMulNBits."""
        zero_points = matrix.zero_points()
        return g.op(
            "MatMulNBits",
            x,
            g.initializer(matrix.codes_in_blocks()),
            g.initializer(matrix.scales(x.dtype or FLOAT)),
            None if zero_points is None else g.initializer(zero_points),
            domain=MICROSOFT,
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=matrix.scheme.bits,
            block_size=matrix.scheme.group_size,
            accuracy_level=ACCURACY_LEVEL,
        )

    def gather_table(self, g: GraphBuilder, ids: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """GatherBlockQuantized."""
        zero_points = matrix.zero_points()
        return g.op(
            "GatherBlockQuantized",
            g.initializer(matrix.codes_as_table()),
            ids,
            g.initializer(matrix.scales(FLOAT)),
            None if zero_points is None else g.initializer(zero_points),
            dtype=FLOAT,
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=matrix.scheme.bits,
            block_size=matrix.scheme.group_size,
        )

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
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """GroupQueryAttention, the rotary embedding inside.

        Without a past nothing reads the keys and values it gives back, but onnxruntime takes its
        flash kernel only if they are asked for, whose memory is linear in the length
        (https://github.com/microsoft/onnxruntime/pull/28962).
        """
        seqlens_k, total, *query_seqlens = rotary
        # position_ids, attention_bias, head_sink, the scales and norms of keys are left out.
        unused = [None] * 7 if query_seqlens else []
        attended, keys, values = g.op_outputs(
            "GroupQueryAttention",
            g.op("Reshape", q, g.constant([0, 0, spec.num_heads * spec.head_dim])),
            g.op("Reshape", k, g.constant([0, 0, spec.num_kv_heads * spec.head_dim])),
            v,
            *(past or (None, None)),
            seqlens_k,
            total,
            *cache,
            *unused,
            *query_seqlens,
            dtypes=[None, None, None],
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=1,
            scale=float(1 / np.sqrt(spec.head_dim)),
        )
        return attended, keys, values


class StandardDialect:
    """RMSNormalization, RotaryEmbedding and Attention of ONNX opset 23."""

    name = "standard"
    continues: str | None = None
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

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Divided by its scale, a row needs one constant scale, as 8-bit engines want it."""
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
        """MatMul between two DequantizeLinear, which engines make an 8-bit product of."""
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
        """MatMul with a blocked DequantizeLinear."""
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
        """Codes and scales are gathered, and multiplied group by group."""
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
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        rotary: list[ir.Value],
        cache: tuple[ir.Value, ir.Value],
        past: tuple[ir.Value, ir.Value] | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Heads first, as TensorRT's parser takes it; no mask but the causal one."""
        assert past is None
        (position_ids,) = rotary

        def heads_first(x: ir.Value) -> ir.Value:
            return g.op("Transpose", x, perm=[0, 2, 1, 3])

        v = g.op("Reshape", v, g.constant([0, 0, spec.num_kv_heads, spec.head_dim]))
        queries = g.op("RotaryEmbedding", heads_first(q), *cache, position_ids)
        keys = g.op("RotaryEmbedding", heads_first(k), *cache, position_ids)
        values = heads_first(v)
        scale = float(1 / np.sqrt(spec.head_dim))
        out = heads_first(g.op("Attention", queries, keys, values, is_causal=1, scale=scale))
        width = spec.num_heads * spec.head_dim
        return g.op("Reshape", out, g.constant([0, 0, width])), keys, values


def row_scales(g: GraphBuilder, x: ir.Value, codes: ir.DataType) -> ir.Value:
    """The largest magnitude of each token by that of a code: [batch, size, n] to [.., 1]."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    floored = g.op("Max", largest, g.constant(TINY, FLOAT))
    return g.op("Mul", floored, g.constant(1 / LARGEST[codes], FLOAT))


DIALECTS: dict[str, Dialect] = {each.name: each for each in (OrtDialect(), StandardDialect())}


def find_dialect(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in DIALECTS:
        raise InputError(f"dialect should be one of {', '.join(DIALECTS)}, found {name!r}")
    return DIALECTS[name]
