"""The quantization methods by name: the library that reads the result, and a matrix's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.spec import ModelSpec
from ...checks import check_numbers
from ...errors import InputError
from ...quantize.formats import GROUP_SIZES, matrices
from ...quantize.nf4 import BLOCK as NF4_BLOCK
from ...quantize.recipe import fit_to_task
from ...quantize.schemes import QuantScheme, ScaleDtype


@dataclass(frozen=True)
class Options:
    """The options of `quantize_checkpoint` that decide what is written; explained there.

    Raises:
        InputError: An option should be an integer and is not.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    double_quant: bool = False
    symmetric: bool = False
    fast: bool = False
    form: str | None = None
    calibration: str | Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self, "bits", "group_size")


@dataclass(frozen=True)
class Method:
    """A way to quantize a checkpoint's projections.

    Attributes:
        library: The format's library: "bitsandbytes", "gptq" or "compressed-tensors".
        bits: A weight's bits by default.
        choices: The bits that can be chosen; empty if there is no choice.
        group_size: Inputs that share a scale by default; None if groups cannot be chosen.
        algorithm: The algorithm that computes codes: see `Recipe`.
        fast: The algorithm of a quicker, worse result.
        format: compressed-tensors' name of the storage format; empty for the others.
        preset: compressed-tensors' name of the scheme; empty for the others.
        zero_points: Whether the format can store zero points; they are then the default.
    """

    library: str
    bits: int
    choices: tuple[int, ...] = ()
    group_size: int | None = None
    algorithm: str = "rtn"
    fast: str = ""
    format: str = ""
    preset: str = ""
    zero_points: bool = False

    @property
    def requires(self) -> str:
        """The software that loads the result."""
        return READERS[self.library]


READERS = {
    "bitsandbytes": "transformers with bitsandbytes, vLLM, or embedport",
    "gptq": "GPTQModel, vLLM, or embedport",
    "compressed-tensors": "transformers 5.15 or later with compressed-tensors, vLLM, or embedport",
}
# Bytes beside a matrix's codes and scales. Of NF4, its sixteen levels and its state as JSON; of
# scales that are quantized, blocks of so many and 256 levels. Of packed codes, a shape.
NF4_STATE = {False: 64 + 79, True: 64 + 165}
NF4_NESTED, NF4_LEVELS = 256, 4 * 256
SHAPE = 16
# AutoGPTQ's format has no zero points here: its version 1 cannot store 0, and vLLM's Marlin kernel
# for it takes symmetric codes only.
METHODS = {
    "bnb-int8": Method("bitsandbytes", 8),
    "bnb-nf4": Method("bitsandbytes", 4, algorithm="gptaq", fast="rtn"),
    "gptq": Method("gptq", 4, choices=(4, 8), group_size=128, algorithm="gptaq", fast="gptq"),
    "awq": Method(
        "compressed-tensors",
        4,
        group_size=128,
        algorithm="awq+gptaq",
        fast="awq",
        format="pack-quantized",
        preset="W4A16_ASYM",
        zero_points=True,
    ),
    "w8a8": Method(
        "compressed-tensors",
        8,
        algorithm="smoothquant+gptaq",
        fast="rtn",
        format="int-quantized",
        preset="W8A8",
    ),
    "fp8": Method("compressed-tensors", 8, format="float-quantized", preset="FP8_DYNAMIC"),
}


@dataclass(frozen=True)
class Plan:
    """A method with its options, checked against the model.

    Attributes:
        name: The method's name.
        method: The method.
        bits: A weight's bits.
        group_size: Inputs that share a scale; None for one scale per output row, or for
            bitsandbytes' own blocks.
        double_quant: Whether bitsandbytes quantizes its scales too.
        symmetric: Whether codes have no zero points.
        algorithm: The algorithm that computes codes.
        rotate_heads: Whether the attention's values are rotated: see `RotatedHeads`.
        dtype: "bfloat16" or "float16", the dtype of unquantized tensors and of computation; set
            from the weights once they are read.
    """

    name: str
    method: Method
    bits: int
    group_size: int | None
    double_quant: bool
    symmetric: bool = True
    algorithm: str = "rtn"
    rotate_heads: bool = True
    dtype: ScaleDtype = "bfloat16"

    @property
    def precision(self) -> str:
        """The name in a manifest."""
        return "gptq-8" if (self.name, self.bits) == ("gptq", 8) else self.name

    @property
    def is_calibrated(self) -> bool:
        """Whether the algorithm runs calibration texts."""
        return self.algorithm != "rtn"

    @property
    def scheme(self) -> QuantScheme:
        """The scheme to quantize a matrix by."""
        if self.name == "bnb-nf4":
            return QuantScheme(4, NF4_BLOCK, symmetric=True, nf4=True)
        # AutoGPTQ's format always has fp16 scales.
        scales = "float16" if self.method.library == "gptq" else self.dtype
        return QuantScheme(self.bits, self.group_size, self.symmetric, scale_dtype=scales)

    def __str__(self) -> str:
        """A matrix's format in a manifest."""
        if self.method.library == "bitsandbytes" or self.name == "fp8":
            return self.name + (" double" if self.double_quant else "")
        if self.group_size is None:
            return f"int{self.bits}"
        return f"int{self.bits}/{self.group_size}{'s' if self.symmetric else ''}"


def plan_method(spec: ModelSpec, options: Options) -> Plan:
    """Check the options against the model.

    Raises:
        InputError: The method is unknown, it does not take an option, or its groups or blocks do
            not divide a matrix.
    """
    name, bits, group_size = options.method, options.bits, options.group_size
    if name not in METHODS:
        raise InputError(f"method should be one of {', '.join(METHODS)}, found {name!r}")
    method = METHODS[name]
    if bits is not None and bits not in (method.choices or (method.bits,)):
        allowed = " or ".join(map(str, method.choices or (method.bits,)))
        raise InputError(f"`method` {name} has {allowed} bits, found `bits` {bits}")
    if group_size is not None and method.group_size is None:
        grouped = ", ".join(key for key, entry in METHODS.items() if entry.group_size)
        raise InputError(f"`method` {name} has no groups: `group_size` goes with {grouped}")
    if group_size not in (None, *GROUP_SIZES):
        raise InputError(f"group_size should be one of {GROUP_SIZES}, found {group_size}")
    if options.double_quant and name != "bnb-nf4":
        raise InputError(f"`double_quant` goes with `method` bnb-nf4, not with {name}")
    if options.symmetric and not method.zero_points:
        having = ", ".join(key for key, entry in METHODS.items() if entry.zero_points)
        raise InputError(f"`method` {name} has no zero points: `symmetric` goes with {having}")
    if options.fast and not method.fast:
        calibrated = ", ".join(key for key, entry in METHODS.items() if entry.fast)
        raise InputError(f"`method` {name} is fast: `fast` goes with {calibrated}")
    plan = Plan(
        name,
        method,
        bits or method.bits,
        group_size or method.group_size,
        options.double_quant,
        options.symmetric or not method.zero_points,
        method.fast if options.fast else fit_to_task(method.algorithm, spec.task),
        # A float's small values have small steps: rotation would only spread the large ones.
        rotate_heads=not (options.fast and method.group_size) and name != "fp8",
    )
    _check_shapes(spec, plan)
    return plan


def _check_shapes(spec: ModelSpec, plan: Plan) -> None:
    # Packed words are filled: rows are heads of 16 values, or as many as another's inputs.
    for matrix in matrices(spec):
        rows, columns = spec.tensor_shapes()[f"{matrix}.weight"]
        if plan.group_size is not None and columns % plan.group_size:
            fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
            advice = f"`group_size` {' or '.join(fitting)}" if fitting else "another `method`"
            raise InputError(
                f"{matrix} of {rows} x {columns} cannot be in groups of {plan.group_size}; "
                f"use {advice}"
            )
        if plan.name == "bnb-nf4" and columns % NF4_BLOCK:
            raise InputError(
                f"{matrix} of {rows} x {columns} cannot be in bitsandbytes' blocks of {NF4_BLOCK} "
                f"inputs, since CPUs with bf16 take whole blocks of a row only; use `method` "
                "bnb-int8, w8a8 or fp8"
            )


def stored_bytes(plan: Plan, shape: tuple[int, int]) -> int:
    """The bytes of a matrix's tensors (see `packing`); of bitsandbytes' NF4 to some 40 bytes."""
    rows, columns = shape
    codes = rows * columns * plan.bits // 8
    if plan.name == "bnb-int8":
        return codes + 4 * rows + 1
    if plan.name == "bnb-nf4":
        blocks = rows * columns // NF4_BLOCK
        scales = (
            blocks + 4 * -(-blocks // NF4_NESTED) + NF4_LEVELS if plan.double_quant else 4 * blocks
        )
        return codes + scales + NF4_STATE[plan.double_quant]
    groups = rows * columns // (plan.group_size or columns)
    zero_points = groups * plan.bits // 8
    total = codes + 2 * groups
    if plan.method.library == "gptq":
        return total + zero_points + 4 * columns
    if plan.method.zero_points:
        return total + (0 if plan.symmetric else zero_points) + SHAPE
    return total
