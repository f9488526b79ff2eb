"""How each matrix of a quantized graph is stored and multiplied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InputError
from ...quantize.schemes import QuantScheme
from ...spec import ModelSpec

TABLE = "embed_tokens"
QUANTIZED = ("int8", "int8-weight", "int4", "fp8")
# The precision of an artifact whose matrices each have a format of their own.
MIXED = "mixed"
# A precision that is found by measuring: the artifact's is MIXED.
AUTO = "auto"
GROUP_SIZES = (32, 64, 128)
# A table has no speed to lose: its groups are as fine as its size allows.
TABLE_GROUPS = {8: 128, 4: 64}
GROUP = {"int8-weight": 128, "int4": 64}
FP8 = "fp8"
TEXT = re.compile(r"int(?P<bits>[48])(/(?P<group>\d+)(?P<symmetric>s?))?")


@dataclass(frozen=True)
class Format:
    """How a matrix is stored and multiplied.

    Its text is what a recipe holds: "int8" has int8 weights with a scale an output channel, and
    each token's activations in 8 bits with a scale of their own; "int4/64" has 4-bit weights with a
    scale and a zero point for 64 inputs, "int8/128s" 8-bit weights without zero points ("s" for
    symmetric), and their activations as the runtime likes. "fp8" is as "int8", in float8 (e4m3).

    Attributes:
        scheme: Of the weights.
        activations: Whether activations are 8 bits too, with a scale for each token.
        float8: Whether these 8 bits are a float's.
    """

    scheme: QuantScheme
    activations: bool = False
    float8: bool = False

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format of a text.

        Raises:
            InputError: It is none.
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


def matrices(spec: ModelSpec) -> list[str]:
    """The projections of a model, layer by layer, by their names without ".weight"."""
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
) -> dict[str, Format]:
    """The same format for every projection, and one for the embedding table.

    Args:
        spec: The model.
        precision: "int8", "int8-weight", "int4" or "fp8".
        dialect: "standard" knows no quantized table, and its engines no zero points; onnxruntime
            has no float8 products.
        group_size: Inputs that share a scale, 32, 64 or 128, for "int8-weight" and "int4".
        embedding_bits: 4 or 8; 8 unless the precision is "int4".

    Raises:
        InputError: An option is wrong, or does not go with the precision.
    """
    if group_size is not None and precision in ("int8", FP8):
        raise InputError(
            f"{precision} has one scale an output channel: --group-size goes with int8-weight and "
            "int4"
        )
    if precision == FP8 and dialect != "standard":
        raise InputError("fp8 is for engines such as TensorRT: it goes with --dialect standard")
    if group_size not in (None, *GROUP_SIZES):
        raise InputError(f"group_size should be one of {GROUP_SIZES}, found {group_size}")
    if embedding_bits not in (None, 4, 8):
        raise InputError(f"embedding_bits should be 4 or 8, found {embedding_bits}")
    if precision in ("int8", FP8):
        chosen = Format.parse(precision)
    else:
        bits = 4 if precision == "int4" else 8
        # Eight bits have range enough without a zero point, and run faster.
        symmetric = bits == 8 or dialect == "standard"
        chosen = Format(QuantScheme(bits, group_size or GROUP[precision], symmetric=symmetric))
    formats = dict.fromkeys(matrices(spec), chosen)
    if dialect == "standard":
        if embedding_bits is not None:
            raise InputError("the standard dialect keeps its table: --embedding-bits goes with ort")
        return formats
    bits = embedding_bits or (4 if precision == "int4" else 8)
    return {TABLE: Format(QuantScheme(bits, TABLE_GROUPS[bits], symmetric=bits == 8))} | formats


def parse_formats(spec: ModelSpec, texts: Mapping[str, str], dialect: str) -> dict[str, Format]:
    """The formats that a recipe holds.

    Raises:
        InputError: A name is not a matrix of the model, a text not a format, or a format not one
            that the dialect or the matrix can have.
    """
    known = {TABLE, *matrices(spec)}
    if unknown := sorted(texts.keys() - known):
        raise InputError(
            f"the recipe names {unknown[0]!r}, which is not a matrix of {spec.source.id}; "
            f"it has {len(known)}, such as {TABLE!r} and 'layers.0.mlp.down_proj'"
        )
    formats = {name: Format.parse(text) for name, text in texts.items()}
    for name, each in formats.items():
        if dialect == "standard" and not each.scheme.symmetric:
            raise InputError(
                f"{name}: {each} has zero points, and the standard dialect's engines take none; "
                f"use {each}s or --dialect ort"
            )
        if each.float8 and dialect != "standard":
            raise InputError(f"{name}: {each} goes with --dialect standard")
        if name == TABLE and (each.activations or (dialect, each.scheme.bits) == ("standard", 4)):
            raise InputError(f"{name}: {each} is not a format of a table in dialect {dialect}")
        size = each.scheme.group_size
        if name == TABLE and dialect == "standard" and size and spec.hidden_size % size:
            raise InputError(
                f"{name}: groups of {size} should divide the width, {spec.hidden_size}, in the "
                "standard dialect"
            )
    return formats
