"""The dialect `standard`: only operators of ONNX itself, for TensorRT, OpenVINO and others."""

from __future__ import annotations

import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from .builder import GraphBuilder
from .dialect import (
    FLOAT,
    INT8,
    Activations,
    AttentionValues,
    Heads,
    LayerPast,
    Positions,
    Rows,
    ScaledTensor,
    apply_scales,
    number_positions,
    row_scales,
    standard_attention,
)
from .initializers import Float8Matrix, QuantizedMatrix


class StandardDialect:
    """RMSNormalization, RotaryEmbedding and Attention of ONNX opset 23."""

    name = "standard"
    continues: str | None = None
    opsets = {"": 23}  # noqa: RUF012 (read only)
    ir_version = 11
    requires = "onnxruntime>=1.23"

    def attention_values(
        self, g: GraphBuilder, positions: Positions, compute: ir.DataType
    ) -> AttentionValues:
        """position_ids."""
        return AttentionValues(position_ids=number_positions(g, positions, positions.arange))

    def cos_sin(
        self, g: GraphBuilder, angles: ir.Value, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Cos and Sin."""
        return g.op("Cos", angles), g.op("Sin", angles)

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """RMSNormalization."""
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ScaledTensor, weight: ir.Value, eps: float
    ) -> tuple[Activations, ir.Value]:
        """Add, then RMSNormalization."""
        total = g.op("Add", residual, g.cast(apply_scales(g, x), residual.dtype or FLOAT))
        return Activations(self.norm(g, total, weight, eps)), total

    def swiglu(
        self, g: GraphBuilder, gate: ScaledTensor, up: ir.Value, width: int, dtype: ir.DataType
    ) -> Activations:
        """Gate times its sigmoid, times up."""
        x = g.cast(apply_scales(g, gate), dtype)
        silu = g.op("Mul", x, g.op("Sigmoid", x))
        return Activations(g.op("Mul", silu, g.cast(up, dtype)))

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Divide rows by their scales first: 8-bit engines need one constant scale."""
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
        """MatMul of two DequantizeLinear: engines turn this pattern into an 8-bit product."""
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
        """Gather codes and scales, and multiply them group by group."""
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
        """Attention."""
        assert past is None
        attended = standard_attention(
            g, self.norm, spec, heads, values.position_ids, cache, compute
        )
        return [attended]
