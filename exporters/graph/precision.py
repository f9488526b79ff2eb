"""Which part of a graph computes in which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from ...errors import InputError
from ...quantize import formats
from ...quantize.formats import AUTO, MIXED, QUANTIZED, TABLE, Format

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
RESIDUAL = "residual stream"


@dataclass(frozen=True)
class Precision:
    """The dtypes of a graph; its inputs and outputs, pooling and head are always fp32.

    Attributes:
        compute: The dtype of matrices, attention and the embedding table.
        residual: The dtype of the residual stream and its RMSNorms.
        kept: Projections ("layers.3.mlp.down_proj") with weights and arithmetic in fp32.
        formats: The quantized matrices' formats.
        table: The dtype of an embedding table without a format; None for `compute`.
    """

    compute: ir.DataType
    residual: ir.DataType
    kept: frozenset[str] = frozenset()
    formats: Mapping[str, Format] = field(default_factory=dict)
    table: ir.DataType | None = None

    @property
    def arithmetic(self) -> str:
        """The name of `compute`."""
        return {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}[self.compute]

    @property
    def rotary(self) -> ir.DataType:
        """The dtype in which queries and keys are rotated.

        bf16's 8-bit mantissa is too short for cosines; fp16's range suffices after the norms.
        """
        return FLOAT16 if self.compute == BFLOAT16 else self.compute

    def dtype_of(self, matrix: str) -> ir.DataType:
        """The dtype of the embedding table, or in which a projection is stored and computed."""
        if matrix == TABLE and self.table is not None:
            return self.table
        return FLOAT if matrix in self.kept else self.compute

    @property
    def has_groups(self) -> bool:
        """Whether a projection's weights are quantized in groups."""
        return any(not format.activations for name, format in self.formats.items() if name != TABLE)

    @property
    def kept_in_fp32(self) -> tuple[str, ...]:
        """Parts in fp32 besides inputs, outputs, pooling and head; empty for an fp32 graph."""
        if self.compute == FLOAT:
            return ()
        stream = (RESIDUAL,) if self.residual == FLOAT else ()
        return stream + tuple(sorted(self.kept, key=_by_layer))


def weight_bytes(spec: ModelSpec, precision: Precision, *, rotates: bool = False) -> int:
    """The approximate bytes of a graph's weights.

    Args:
        spec: The model.
        precision: The graph's dtypes and formats.
        rotates: Whether the residual stream is rotated: an embedder's result is then multiplied by
            a matrix in fp32, while a reranker's head is rotated itself.
    """
    total = formats.weight_bytes(
        spec, precision.formats, lambda name: precision.dtype_of(name).bitwidth // 8
    )
    if rotates and spec.task == "embedding":
        total += FLOAT.bitwidth // 8 * spec.hidden_size**2
    return total


def _by_layer(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]), name


# bf16 has fp32's range, but its 8-bit mantissa is too short for a sum over 28 to 36 layers: the
# residual stream stays in fp32. Calibration finds what stays in fp32 for fp16.
PRECISIONS = {
    "fp32": Precision(FLOAT, FLOAT),
    "fp16": Precision(FLOAT16, FLOAT16),
    "bf16": Precision(BFLOAT16, FLOAT),
}


def find_precision(name: str, arithmetic: str = "fp32") -> Precision:
    """A precision by its name; a quantized one still lacks the formats of its matrices.

    Args:
        name: The precision.
        arithmetic: The compute dtype of a quantized precision, "fp32" or "bf16".

    Raises:
        InputError: The name is unknown.
    """
    if name in (*QUANTIZED, AUTO, MIXED):
        return PRECISIONS[arithmetic]
    if name not in PRECISIONS:
        names = ", ".join((*PRECISIONS, *QUANTIZED, AUTO))
        raise InputError(f"precision should be one of {names}, found {name!r}")
    return PRECISIONS[name]
