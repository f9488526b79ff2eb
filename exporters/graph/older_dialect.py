"""The dialect `older`: onnxruntime's fused operators as far as version 1.20 has them.

Software often brings an onnxruntime of its own, and not the latest: text-embeddings-inference,
Triton's images, Jetson. Those refuse opset 23 and IR 11, and lack the standard's Attention, blocked
QuantizeLinear and GatherBlockQuantized. The weights are those of the dialect `ort`, tensor by
tensor, so that graphs of both dialects can lie over one data file.
"""

from __future__ import annotations

import onnx_ir as ir

from .builder import GraphBuilder
from .dialect import FLOAT, INT64, MICROSOFT, UINT8, Rows, row_scales
from .initializers import QuantizedMatrix
from .ort_dialect import ZERO_POINT, OrtDialect


class OlderDialect(OrtDialect):
    """GroupQueryAttention for all rows, and no functions, so none of embedport's kernels."""

    name = "older"
    continues = None
    opsets = {"": 21, MICROSOFT: 1}  # noqa: RUF012 (read only)
    ir_version = 10
    requires = "onnxruntime>=1.20"
    has_functions = False

    def quantize_rows(self, g: GraphBuilder, x: ir.Value, width: int, codes: ir.DataType) -> Rows:
        """Divide by the scale, round to even, shift to uint8 around 128."""
        scales = row_scales(g, x, codes)
        rounded = g.op("Round", g.op("Div", x, scales))
        shifted = g.op("Add", rounded, g.constant(float(ZERO_POINT), FLOAT))
        return Rows(g.cast(shifted, UINT8), scales)

    def gather_table(self, g: GraphBuilder, ids: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """Gather codes and scales, unpack 4-bit codes, and multiply group by group."""
        bits, groups = matrix.scheme.bits, matrix.groups
        zero_points = matrix.zero_points()
        codes = g.op("Gather", g.initializer(matrix.codes_as_table()), ids, axis=0)
        scales = g.op("Gather", g.initializer(matrix.scales(FLOAT)), ids, axis=0)
        values = g.op("Reshape", _unpacked(g, codes, bits), g.constant([0, 0, groups, -1]))
        if zero_points is None:
            zeros = g.constant(float(1 << (bits - 1)), FLOAT)
        else:
            packed = g.op("Gather", g.initializer(zero_points), ids, axis=0)
            zeros = _unpacked(g, packed, bits)
            zeros = g.op("Slice", zeros, g.constant([0]), g.constant([groups]), g.constant([2]))
            zeros = g.op("Unsqueeze", zeros, g.constant([3]))
        shifted = g.op("Sub", values, zeros)
        product = g.op("Mul", shifted, g.op("Unsqueeze", scales, g.constant([3])))
        return g.op("Reshape", product, g.constant([0, 0, matrix.shape[1]]))


def _unpacked(g: GraphBuilder, codes: ir.Value, bits: int) -> ir.Value:
    """Unsigned codes from bytes, the lower nibble first: uint8 [batch, size, n] to float32."""
    if bits == 8:
        return g.cast(codes, FLOAT)
    low = g.op("BitwiseAnd", codes, g.constant(15, UINT8))
    high = g.op("BitShift", codes, g.constant(4, UINT8), direction="RIGHT")
    pairs = g.op(
        "Concat",
        *(g.op("Unsqueeze", g.cast(half, FLOAT), g.constant([3])) for half in (low, high)),
        axis=3,
    )
    shape = g.op("Shape", codes, dtype=INT64)
    rows = g.op("Slice", shape, g.constant([0]), g.constant([2]))
    return g.op("Reshape", pairs, g.op("Concat", rows, g.constant([-1]), axis=0))
