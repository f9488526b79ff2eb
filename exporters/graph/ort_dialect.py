"""The dialect `ort`: onnxruntime's fused operators (domain com.microsoft)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ...attention import SHORT_ROW
from ...checkpoint.spec import ModelSpec
from . import ort_attention
from .builder import GraphBuilder
from .dialect import (
    BFLOAT16,
    BOOL,
    FLOAT,
    INT8,
    INT64,
    MICROSOFT,
    UINT8,
    Activations,
    AttentionValues,
    Dialect,
    Heads,
    LayerPast,
    Positions,
    Rows,
    ScaledTensor,
    apply_scales,
    attention_scale,
    number_positions,
    row_scales,
)
from .initializers import Float8Matrix, QuantizedMatrix

ZERO_POINT = 128
# MatMulNBits quantizes activations to int8, with one scale per block of a token.
ACCURACY_LEVEL = 4
# Up to this many tokens, a row's attention is computed in one part.
SMALL_ROW = 128


class OrtDialect(Dialect):
    """GroupQueryAttention, SkipSimplifiedLayerNormalization and QuickGelu of onnxruntime.

    In fp32, for CPUs, they are in functions, which embedport has kernels for.
    """

    name = "ort"
    # Adds the input query_seqlens; without it a past works only for a batch of one row.
    continues: str | None = "onnxruntime>=1.32"
    opsets = {"": 23, MICROSOFT: 1}  # noqa: RUF012 (read only)
    # Before 1.27, GatherBlockQuantized reads wrong rows if a row has an odd number of 4-bit groups.
    # In 1.27, SkipSimplifiedLayerNormalization gives NaN now and then.
    requires = "onnxruntime>=1.28"
    has_functions = True

    def _uses_functions(self, dtype: ir.DataType | None) -> bool:
        """Whether operators in a dtype are in functions."""
        return self.has_functions and dtype == FLOAT

    def attention_values(
        self, g: GraphBuilder, positions: Positions, compute: ir.DataType
    ) -> AttentionValues:
        """Lengths, and position_ids if `attention` rotates: in its function, and in bf16.

        `small` and `short` are for its function only, `lengths` only with a past.
        """
        last, total = g.op("Sub", positions.lengths, g.constant(1)), positions.size
        arange = positions.arange
        if positions.past is not None:
            last, total, arange = (
                g.op("Add", count, positions.past) for count in (last, total, arange)
            )

        def per_row(count: ir.Value) -> ir.Value:
            return g.op("Squeeze", g.cast(count, ir.DataType.INT32), g.constant([1]))

        values = AttentionValues(last=per_row(last), total=g.cast(total, ir.DataType.INT32))
        if positions.past is not None:
            values = values._replace(lengths=per_row(positions.lengths))
        if compute != BFLOAT16 and not self._uses_functions(compute):
            return values
        values = values._replace(position_ids=number_positions(g, positions, arange))
        if not self._uses_functions(compute):
            return values
        short = positions.short
        if short is None:
            short = g.op("LessOrEqual", total, g.constant(SHORT_ROW), dtype=BOOL)
        small = g.op("LessOrEqual", positions.size, g.constant(SMALL_ROW), dtype=BOOL)
        small = g.op("And", short, small)
        return values._replace(small=small, short=short)

    def cos_sin(self, g: GraphBuilder, angles: ir.Value, compute: ir.DataType) -> list[ir.Value]:
        """Cos and Sin."""
        plain = super().cos_sin
        if not self._uses_functions(compute):
            return plain(g, angles, compute)
        return g.call(
            "CosSin",
            angles,
            dtypes=[FLOAT] * 2,
            describe=lambda f, angles: plain(f, angles, compute),
        )

    def norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """SimplifiedLayerNormalization."""
        if not self._uses_functions(x.dtype):
            return norm(g, x, weight, eps)
        return g.call(
            "Norm",
            x,
            weight,
            dtypes=[FLOAT],
            describe=lambda f, x, weight: [norm(f, x, weight, eps)],
            epsilon=eps,
        )[0]

    def add_norm(
        self, g: GraphBuilder, residual: ir.Value, x: ScaledTensor, weight: ir.Value, eps: float
    ) -> tuple[Activations, ir.Value]:
        """SkipSimplifiedLayerNormalization.

        After an 8-bit product, its function also quantizes for the next one.
        """
        dtype = residual.dtype or FLOAT
        if not self._uses_functions(dtype) or (x.scales is None and x.value.dtype != FLOAT):
            normed, total = add_norm(g, residual, g.cast(apply_scales(g, x), dtype), weight, eps)
            return Activations(normed), total
        if x.scales is None:
            normed, total = g.call(
                "AddNorm",
                residual,
                weight,
                x.value,
                dtypes=[FLOAT, FLOAT],
                describe=lambda f, residual, weight, x: add_norm(f, residual, x, weight, eps),
                epsilon=eps,
            )
            return Activations(normed), total

        def describe(f: GraphBuilder, residual: ir.Value, *x: ir.Value) -> list[ir.Value]:
            *product, weight = x
            normed, total = add_norm(
                f, residual, apply_scales(f, ScaledTensor(*product)), weight, eps
            )
            return [total, normed, *_round_rows(f, normed)]

        assert weight.shape is not None
        (width,) = weight.shape.numpy()
        total, normed, *rows = g.call(
            "AddNormQuantize",
            residual,
            x.value,
            x.scales,
            weight,
            dtypes=[FLOAT, FLOAT, UINT8, FLOAT],
            describe=describe,
            epsilon=eps,
            width=width,
        )
        return Activations(normed, rows={INT8: Rows(*rows)}), total

    def swiglu(
        self, g: GraphBuilder, gate: ScaledTensor, up: ir.Value, width: int, dtype: ir.DataType
    ) -> Activations:
        """QuickGelu with alpha 1 is silu.

        Between 8-bit products, its function also quantizes for the next one.
        """
        plain = gate.value.dtype == up.dtype == FLOAT
        if not self._uses_functions(dtype) or (gate.scales is None and not plain):
            return Activations(swiglu(g, g.cast(apply_scales(g, gate), dtype), g.cast(up, dtype)))
        if gate.scales is None:
            (product,) = g.call(
                "Swiglu",
                gate.value,
                up,
                dtypes=[FLOAT],
                describe=lambda f, gate, up: [swiglu(f, gate, up)],
            )
            return Activations(product)

        def describe(
            f: GraphBuilder, gate: ir.Value, scales: ir.Value, up: ir.Value
        ) -> list[ir.Value]:
            product = swiglu(f, apply_scales(f, ScaledTensor(gate, scales)), up)
            return [product, *_round_rows(f, product)]

        product, *rows = g.call(
            "SwigluQuantize",
            gate.value,
            gate.scales,
            up,
            dtypes=[FLOAT, UINT8, FLOAT],
            describe=describe,
            width=width,
        )
        return Activations(product, rows={INT8: Rows(*rows)})

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Uint8 around 128: on x86 onnxruntime multiplies it thirty times as fast as int8."""
        rows = g.call(
            "QuantizeRows",
            x,
            dtypes=[UINT8, FLOAT],
            describe=_round_rows,
            width=width,
        )
        return Rows(*rows)

    def matmul_rows(
        self,
        g: GraphBuilder,
        rows: Rows,
        matrix: QuantizedMatrix | Float8Matrix,
        compute: ir.DataType,
    ) -> ir.Value:
        """MatMulIntegerToFloat with a row scale of 1; on CPUs and in fp32 only."""
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
        inputs, attributes = _grouped(g, x, matrix)
        has_zero_points = len(inputs) > 3
        # The kernel's 8-bit weights are int8; less a zero point, a code would need 9 bits.
        if not self._uses_functions(x.dtype) or (matrix.scheme.bits == 8 and has_zero_points):
            return _matmul_groups(g, *inputs, **attributes)

        def describe(f: GraphBuilder, *inputs: ir.Value) -> list[ir.Value]:
            given = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in attributes}
            return [_matmul_groups(f, *inputs, **given)]

        return g.call(
            "MatMulGroups" if has_zero_points else "MatMulSymmetricGroups",
            *inputs,
            dtypes=[FLOAT],
            describe=describe,
            **attributes,
        )[0]

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
        heads: Heads,
        values: AttentionValues,
        cache: tuple[ir.Value, ir.Value],
        compute: ir.DataType,
        past: LayerPast | None,
    ) -> list[ir.Value]:
        """GroupQueryAttention, or in its function what is fastest for the rows' length."""
        if not self._uses_functions(compute):
            assert past is None
            return [ort_attention.fused(g, norm, spec, heads, values, cache, compute)]
        v, scales = heads.v
        # In the order of `ort_attention.KernelInputs`.
        inputs = (
            heads.q,
            heads.k,
            v,
            g.constant([[[1]]], FLOAT) if scales is None else scales,
            heads.q_norm,
            heads.k_norm,
            *cache,
            *values,
            *(past or ()),
        )
        return g.call(
            "RotaryAttention",
            *(value for value in inputs if value is not None),
            dtypes=[FLOAT] * (1 if past is None else 3),
            describe=lambda f, *inputs: ort_attention.chosen_by_length(f, norm, spec, *inputs),
            epsilon=spec.rms_norm_eps,
            scale=attention_scale(spec),
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
        )


class UnroundedOrtDialect(OrtDialect):
    """The dialect `ort`, but weights in groups are multiplied by activations that stay fp32."""

    def matmul_groups(self, g: GraphBuilder, x: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """MatMulNBits, which rounds no activations unless it is told to."""
        inputs, attributes = _grouped(g, x, matrix)
        return g.op("MatMulNBits", *inputs, domain=MICROSOFT, **attributes)


def _grouped(
    g: GraphBuilder, x: ir.Value, matrix: QuantizedMatrix
) -> tuple[list[ir.Value], dict[str, Any]]:
    """MatMulNBits' inputs and attributes."""
    inputs = [
        x,
        g.initializer(matrix.codes_in_blocks()),
        g.initializer(matrix.scales(x.dtype or FLOAT)),
    ]
    zero_points = matrix.zero_points()
    if zero_points is not None:
        inputs.append(g.initializer(zero_points))
    return inputs, {
        "K": matrix.shape[1],
        "N": matrix.shape[0],
        "bits": matrix.scheme.bits,
        "block_size": matrix.scheme.group_size or matrix.shape[1],
    }


def _matmul_groups(g: GraphBuilder, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """MatMulNBits with 8-bit activations."""
    return g.op(
        "MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=ACCURACY_LEVEL, **attributes
    )


def norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """SimplifiedLayerNormalization: onnxruntime's RMSNorm, in the ONNX domain."""
    return g.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def add_norm(
    g: GraphBuilder, residual: ir.Value, x: ir.Value, weight: ir.Value, eps: float
) -> tuple[ir.Value, ir.Value]:
    """SkipSimplifiedLayerNormalization; its fourth output is the sum."""
    normed, _, _, total = g.op_outputs(
        "SkipSimplifiedLayerNormalization",
        residual,
        x,
        weight,
        dtypes=[None, FLOAT, FLOAT, None],
        domain=MICROSOFT,
        epsilon=eps,
    )
    return normed, total


def swiglu(g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """QuickGelu with alpha 1 is silu, in one pass; bf16 values are computed in fp32.

    CUDA rounds each step and computes a negative value's sigmoid as 1 - y, which cancels to zero
    in bf16's 8-bit mantissa.
    """
    dtype = gate.dtype or FLOAT
    gate = g.cast(gate, FLOAT) if dtype == BFLOAT16 else gate
    silu = g.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
    return g.op("Mul", g.cast(silu, dtype), up)


def _round_rows(f: GraphBuilder, x: ir.Value) -> list[ir.Value]:
    """Quantize rows, in a function with the attribute `width`: codes and scales.

    QuantizeLinear's block is a whole token, so one pass does it, without a division before.
    """
    scales = row_scales(f, x, INT8)
    shape = f.op("Shape", scales, dtype=INT64)
    zero_points = f.op("Expand", f.constant(ZERO_POINT, UINT8), shape)
    width = ir.RefAttr("block_size", "width", ir.AttributeType.INT)
    codes = f.op("QuantizeLinear", x, scales, zero_points, dtype=UINT8, axis=-1, block_size=width)
    return [codes, scales]
