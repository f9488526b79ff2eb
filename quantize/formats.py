"""How each matrix of a quantized graph is stored and multiplied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..checkpoint.spec import ModelSpec
from ..errors import InputError
from .schemes import QuantScheme

TABLE = "embed_tokens"
QUANTIZED = ("int8", "int8-weight", "int4", "fp8")
# The precision of an artifact with a format per matrix.
MIXED = "mixed"
# A search chooses the formats; the artifact's precision is then MIXED.
AUTO = "auto"
GROUP_SIZES = (32, 64, 128)
# Small groups cost a table size but no speed: it is looked up, not multiplied.
TABLE_GROUPS = {8: 128, 4: 64}
GROUP = 128
# Rounding to nearest needs smaller groups in 4 bits.
FAST_GROUP = 64
FP8 = "fp8"
TEXT = re.compile(r"int(?P<bits>[48])(/(?P<group>\d+)(?P<symmetric>s?))?")


@dataclass(frozen=True)
class Format:
    """How a matrix is stored and multiplied.

    A recipe holds it as text:

    - "int8": 8-bit weights with a scale per output channel, 8-bit activations with a scale per
      token
    - "fp8": the same in float8 (e4m3)
    - "int4/64": 4-bit weights with a scale and a zero point per 64 inputs
    - "int8/128s": 8-bit weights with a scale per 128 inputs, no zero points ("s": symmetric)

    For the last two, the runtime chooses the dtype of activations.

    Attributes:
        scheme: How the weights are quantized.
        activations: Whether activations are 8-bit too, with a scale per token.
        float8: Whether these 8 bits are float8.
    """

    scheme: QuantScheme
    activations: bool = False
    float8: bool = False

    @classmethod
    def parse(cls, text: str) -> Format:
        """Parse a format's text.

        Raises:
            InputError: The text is not a format.
        """
        if not isinstance(text, str):
            raise InputError(f"a format should be text like int8 or int4/64, found {text!r}")
        if text == FP8:
            return cls(QuantScheme(8, None, symmetric=True), activations=True, float8=True)
        match = TEXT.fullmatch(text)
        if match is None or (match["group"] is None and match["bits"] == "4"):
            raise InputError(
                f"a format should be like int8, fp8, int8/128s or int4/64, found {text!r}"
            )
        if match["group"] is None:
            scheme = QuantScheme(8, None, symmetric=True, limits_pairs=True)
            return cls(scheme, activations=True)
        bits, group = int(match["bits"]), int(match["group"])
        if group not in GROUP_SIZES:
            raise InputError(f"a format's group should be one of {GROUP_SIZES}, found {text!r}")
        return cls(QuantScheme(bits, group, symmetric=bool(match["symmetric"])))

    def __str__(self) -> str:
        scheme = self.scheme
        if self.float8:
            return FP8
        if self.activations:
            return f"int{scheme.bits}"
        return f"int{scheme.bits}/{scheme.group_size}{'s' if scheme.symmetric else ''}"


def quantized_bytes(format: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [out, in]: its codes, fp32 scales and packed zero points."""
    rows, columns = shape
    scheme = format.scheme
    groups = -(-columns // (scheme.group_size or columns))
    codes = groups * (scheme.group_size or columns) * scheme.bits // 8
    zero_points = 0 if scheme.symmetric else -(-groups * scheme.bits // 8)
    return rows * (codes + 4 * groups + zero_points)


def weight_bytes(
    spec: ModelSpec, formats: Mapping[str, Format], float_bytes: Callable[[str], int]
) -> int:
    """The approximate bytes of a graph's weights.

    Args:
        spec: The model.
        formats: The quantized matrices' formats.
        float_bytes: Bytes of one value of any other tensor, by its name without ".weight".
    """
    total = 0
    for name, shape in spec.tensor_shapes().items():
        matrix = name.removesuffix(".weight")
        if name == "lm_head.weight":
            continue  # a reranker needs one row of it, an embedding model none
        if matrix in formats:
            total += quantized_bytes(formats[matrix], (shape[0], shape[1]))
        else:
            total += math.prod(shape) * float_bytes(matrix)
    return total


def artifact_bytes(spec: ModelSpec) -> dict[str, int]:
    """Approximate bytes of an artifact's weights, by precision."""
    sizes = {"fp32": 4, "fp16": 2, "bf16": 2} | dict.fromkeys(QUANTIZED, 4) | {FP8: 2}
    formats = {
        name: plan_formats(spec, name, dialect="standard" if name == FP8 else "ort")
        for name in QUANTIZED
    }
    return {
        name: weight_bytes(spec, formats.get(name, {}), lambda _, size=size: size)
        for name, size in sizes.items()
    }


def matrices(spec: ModelSpec) -> list[str]:
    """The names of a model's projections, layer by layer, without ".weight"."""
    return [
        name.removesuffix(".weight")
        for name, shape in spec.tensor_shapes().items()
        if len(shape) == 2 and name.startswith("layers.")
    ]


def plan_formats(
    spec: ModelSpec,
    precision: str,
    *,
    dialect: str,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    fast: bool = False,
) -> dict[str, Format]:
    """Give all projections the same format, and the embedding table one of its own.

    Args:
        spec: The model.
        precision: "int8", "int8-weight", "int4" or "fp8".
        dialect: "standard" quantizes no table, and its engines take no zero points; onnxruntime
            has no float8 products.
        group_size: Inputs that share a scale, 32, 64 or 128, for "int8-weight" and "int4".
        embedding_bits: 4 or 8; 8 by default.
        fast: For "int4": defaults for rounding to nearest, groups of 64 and a table of 4 bits.

    Raises:
        InputError: An option is wrong, or does not fit the precision.
    """
    if group_size is not None and precision in ("int8", FP8):
        raise InputError(
            f"{precision} has one scale an output channel: `group_size` goes with int8-weight and "
            "int4"
        )
    if precision == FP8 and dialect != "standard":
        raise InputError("fp8 is for engines such as TensorRT: it goes with `dialect` standard")
    if fast and precision != "int4":
        raise InputError(f"{precision} is fast: `fast` goes with int4")
    if group_size not in (None, *GROUP_SIZES):
        raise InputError(f"group_size should be one of {GROUP_SIZES}, found {group_size}")
    if embedding_bits not in (None, 4, 8):
        raise InputError(f"embedding_bits should be 4 or 8, found {embedding_bits}")
    if precision in ("int8", FP8):
        format = Format.parse(precision)
    else:
        bits = 4 if precision == "int4" else 8
        # Eight bits are precise enough without a zero point, and run faster.
        symmetric = bits == 8 or dialect == "standard"
        size = group_size or (FAST_GROUP if fast else GROUP)
        widths = [spec.tensor_shapes()[f"{name}.weight"][1] for name in matrices(spec)]
        if group_size is None and dialect == "standard" and any(width % size for width in widths):
            size = FAST_GROUP  # engines take whole groups only
        format = Format(QuantScheme(bits, size, symmetric=symmetric))
    formats = dict.fromkeys(matrices(spec), format)
    if dialect == "standard":
        if embedding_bits is not None:
            raise InputError("the standard dialect keeps its table: `embedding_bits` goes with ort")
        return formats
    bits = embedding_bits or (4 if fast else 8)
    table = Format(QuantScheme(bits, TABLE_GROUPS[bits], symmetric=bits == 8))
    _check_table(spec, table)
    return {TABLE: table} | formats


def _check_table(spec: ModelSpec, table: Format) -> None:
    if splits_a_byte(spec, table):
        raise InputError(
            f"{TABLE}: {table} holds two values a byte, and hidden_size is odd, {spec.hidden_size}:"
            " use `embedding_bits` 8"
        )


def parse_formats(spec: ModelSpec, texts: Mapping[str, str], dialect: str) -> dict[str, Format]:
    """Parse a recipe's formats.

    Raises:
        InputError: A name is not a matrix of the model, a text is not a format, or the dialect or
            the matrix does not support the format.
    """
    known = {TABLE, *matrices(spec)}
    if unknown := sorted(texts.keys() - known):
        raise InputError(
            f"the recipe names {unknown[0]!r}, which is not a matrix of {spec.source.id}; "
            f"it has {len(known)}, such as {TABLE!r} and 'layers.0.mlp.down_proj'"
        )
    formats = {name: Format.parse(text) for name, text in texts.items()}
    for name, format in formats.items():
        if dialect == "standard" and not format.scheme.symmetric:
            raise InputError(
                f"{name}: {format} has zero points, and the standard dialect's engines take none; "
                f"use {format}s or `dialect` ort"
            )
        if format.float8 and dialect != "standard":
            raise InputError(f"{name}: {format} goes with `dialect` standard")
        if name == TABLE and (
            format.activations or (dialect, format.scheme.bits) == ("standard", 4)
        ):
            raise InputError(f"{name}: {format} is not a format of a table in dialect {dialect}")
        if name == TABLE:
            _check_table(spec, format)
        if name == TABLE and dialect == "standard" and ends_in_part(spec, format):
            raise InputError(
                f"{name}: groups of {format.scheme.group_size} should divide the width, "
                f"{spec.hidden_size}, in the standard dialect"
            )
    return formats


def splits_a_byte(spec: ModelSpec, table: Format) -> bool:
    """Whether a row of the table would end within a byte, which onnxruntime does not take."""
    return table.scheme.bits == 4 and spec.hidden_size % 2 == 1


def ends_in_part(spec: ModelSpec, table: Format) -> bool:
    """Whether the last of the table's groups is shorter than the others.

    Only onnxruntime's own operator reads such rows; all else takes them for groups of equal sizes.
    """
    size = table.scheme.group_size
    return size is not None and size < spec.hidden_size and spec.hidden_size % size > 0
