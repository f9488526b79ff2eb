"""Reads a checkpoint's `quantization_config`: how its matrices are quantized and stored.

Formats that embedport dequantizes itself, matrix by matrix:

- AutoGPTQ and its successor GPTQModel: quant_method "gptq"; checkpoint_format "gptq" stores zero
  points minus one, "gptq_v2" unchanged (gptqmodel.utils.model.convert_gptq_v1_to_v2_format).
- AutoAWQ: quant_method "awq", version "gemm".
- AutoRound: quant_method "auto-round"; its packing_format "auto_round:auto_gptq" is GPTQ's "gptq",
  "auto_round" is "gptq_v2", "auto_round:auto_awq" is AWQ's (auto_round.inference.backend).
- compressed-tensors: formats "pack-quantized", "int-quantized", "float-quantized",
  "naive-quantized" and "nvfp4-pack-quantized".
- transformers' fine-grained fp8: quant_method "fp8".

If such a checkpoint quantizes activations, too, only its weights are read.

Formats that run in their own library: bitsandbytes, and compressed-tensors with 8-bit weights and
activations. Only known configuration keys are passed on to the library, because compressed-tensors
treats some names as paths of Python files and runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..strict_json import read_json

Layout = Literal["gptq", "awq", "packed", "plain", "fp8", "nvfp4"]
Kind = Literal["int", "float"]
ZERO_POINT_OFFSETS = {"gptq": 1, "gptq_v2": 0}
GPTQ_CONFIG = "quantize_config.json"
# AutoRound's packing_format: auto_round.inference.backend and convert_model.
AUTO_ROUND: dict[str, tuple[Layout, int]] = {
    "auto_round": ("gptq", 0),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptq": ("gptq", 1),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
}
BITSANDBYTES = (
    "quant_method",
    "load_in_8bit",
    "load_in_4bit",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
)
COMPUTED = ("float16", "bfloat16", "float32")
# compressed-tensors with 8-bit weights and activations: (type, bits) to the precision's name.
SCHEMES = {("int", 8): "w8a8", ("float", 8): "fp8"}
# compressed-tensors' formats: the layout of the weights, and their possible (type, bits).
FORMATS: dict[str, tuple[Layout, tuple[tuple[str, int], ...]]] = {
    "pack-quantized": ("packed", (("int", 4), ("int", 8))),
    "int-quantized": ("plain", (("int", 4), ("int", 8))),
    "float-quantized": ("plain", (("float", 8),)),
    "naive-quantized": ("plain", (("int", 4), ("int", 8), ("float", 8))),
    "nvfp4-pack-quantized": ("nvfp4", (("float", 4),)),
}
# What a group and its weights may say: the library refuses others, too (QuantizationScheme, -Args).
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
WEIGHT_KEYS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
# The values of its actorder for which the groups of inputs are stored.
REORDERED = ("group", "dynamic", True)
LIBRARY_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
UNREAD = ("sparsity_config", "transform_config", "kv_cache_scheme", "moe_sparsity_config")
# Group sizes (inputs that share a scale) of the graph's own formats, the largest first.
GRAPH_GROUPS = (128, 64, 32)
LARGEST_BLOCK = 1 << 20
# The names of a matrix's codes, or of its values, in all layouts.
CODES = ("weight", "qweight", "weight_packed")
INSTEAD = "give the original in bf16, fp16 or fp32"


@dataclass(frozen=True)
class MatrixFormat:
    """How the codes of a matrix [out, in] are stored, and which of them share a scale.

    Attributes:
        layout: How codes are packed and tensors named: see `quantize.stored`.
        kind: Whether a code is an integer or a float.
        bits: Bits per code, 4 or 8.
        block: (outputs, inputs) that share a scale; None for all of them.
        zero_point_offset: Added to each stored zero point.
        has_zero_points: Whether zero points are stored; None if the tensors show it.
        has_order: Whether each input's group must be stored (act-order).
    """

    layout: Layout
    kind: Kind
    bits: int
    block: tuple[int | None, int | None]
    zero_point_offset: int = 0
    has_zero_points: bool | None = None
    has_order: bool = False

    @property
    def graph_group(self) -> int | None:
        """The group size in which a graph holds the codes; None if it cannot.

        A graph has groups of 32, 64 or 128 inputs. Larger ones are cut into groups that share a
        scale.
        """
        rows, size = self.block
        if self.kind != "int" or rows != 1:
            return None
        return next((group for group in GRAPH_GROUPS if size is None or size % group == 0), None)

    def __str__(self) -> str:
        kind = f"{self.kind}{self.bits}"
        match self.block:
            case (None, None):
                return f"{kind}, one scale"
            case (1, None):
                return f"{kind}, one scale per output"
            case (1, columns):
                return f"{kind}, one scale per {columns} inputs of an output"
            case (rows, columns):
                return f"{kind}, one scale per {rows} outputs x {columns} inputs"


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint's projections are quantized; all other tensors are in floating point.

    Attributes:
        method: "gptq", "awq", "auto-round", "compressed-tensors" or "fp8".
        formats: The formats in use; each quantized projection has one of them.
        reorders: Whether inputs may be assigned to groups in any order (act-order).
        rounds_activations: Whether the format's own library quantizes activations, too. Reading
            the weights does not.
    """

    method: str
    formats: tuple[MatrixFormat, ...]
    reorders: bool = False
    rounds_activations: bool = False

    @property
    def precision(self) -> str:
        """Name of the precision, that of the coarsest format."""
        coarsest = min(self.formats, key=lambda format_: format_.bits)
        if self.method in ("gptq", "awq"):
            return "gptq-8" if coarsest.bits == 8 else self.method
        if coarsest.kind == "float":
            return "fp8" if coarsest.bits == 8 else "nvfp4"
        return f"w{coarsest.bits}a16"  # the files do not say which algorithm chose the codes

    @property
    def graph_bits(self) -> int | None:
        """Bits of the codes if a graph can use them unchanged; else None."""
        bits = {None if format_.graph_group is None else format_.bits for format_ in self.formats}
        return None if self.reorders or len(bits) > 1 else bits.pop()


@dataclass(frozen=True)
class LibraryQuantization:
    """The quantization of a checkpoint that runs in its own library.

    Attributes:
        method: "bitsandbytes" or "compressed-tensors".
        precision: "bnb-int8", "bnb-nf4", "w8a8" or "fp8".
        values: The `quantization_config` for the library, with known keys only.
        weights: How to read the weights without the library; None if that is not supported.
    """

    method: Literal["bitsandbytes", "compressed-tensors"]
    precision: str
    values: Mapping[str, Any]
    weights: StoredQuantization | None = None


def read_quantization(
    values: Mapping[str, Any] | None, path: Path
) -> StoredQuantization | LibraryQuantization | None:
    """Read a `quantization_config`; None if there is none.

    Args:
        values: The object in config.json.
        path: The config.json, for errors.

    Raises:
        CheckpointError: It is not supported.
    """
    if not values:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: quantization_config should be an object, found {values!r}")
    method = values.get("quant_method")
    readers = {
        "gptq": _read_gptq,
        "awq": _read_awq,
        "auto-round": _read_auto_round,
        "intel/auto-round": _read_auto_round,
        "compressed-tensors": _read_compressed_tensors,
        "fp8": _read_fine_grained,
        "bitsandbytes": _read_bitsandbytes,
    }
    if not isinstance(method, str) or method not in readers:
        raise CheckpointError(
            f"{path}: a checkpoint quantized by {method!r} (quantization_config) is not read, only "
            f"by {', '.join(map(repr, readers))}; {INSTEAD}"
        )
    where = f"{path}: quantization_config"
    if method == "gptq":
        _compare_formats(values, where, path.with_name(GPTQ_CONFIG))
    return readers[method](values, where)


def _compare_formats(values: Mapping[str, Any], where: str, other: Path) -> None:
    """Refuse a second configuration with another format; the tensors would not show which is right.

    GPTQModel reads it in place of config.json's, transformers does not.
    """
    if not other.exists():
        return
    ours = _gptq_format(values, where)
    theirs = _gptq_format(read_json(other), str(other))
    if ours != theirs:
        raise CheckpointError(
            f"{other}: checkpoint_format (or format) is {theirs!r}, in {where} {ours!r}; each has "
            "readers, and zero points are other numbers in each: correct the wrong file"
        )


def _gptq_format(values: Mapping[str, Any], where: str) -> str:
    return _one_of(values, where, ("checkpoint_format", "format"), tuple(ZERO_POINT_OFFSETS))


def _read_gptq(values: Mapping[str, Any], where: str) -> StoredQuantization:
    _refuse(values, where, pack_dtype=("int32",), rotation=(), is_marlin_format=(), adapter=())
    form = _gptq_format(values, where)
    base = _grouped("gptq", values, where, ZERO_POINT_OFFSETS[form])
    # GPTQModel: name pattern to overrides; a pattern that begins with "-:" is left unquantized.
    place = f"{where}: dynamic"
    dynamic = _object(values.get("dynamic"), place)
    overrides = [_object(o, place) for name, o in dynamic.items() if not name.startswith("-")]
    for override in overrides:
        _refuse(override, place, format=(form,), method=("gptq",), activation=())
    formats = _with_overrides(base, values, overrides, place)
    reorders = any({**values, **override}.get("desc_act") for override in ({}, *overrides))
    return StoredQuantization("gptq", formats, reorders, bool(values.get("activation")))


def _read_awq(values: Mapping[str, Any], where: str) -> StoredQuantization:
    _one_of(values, where, ("version", "format", "checkpoint_format"), ("gemm",))
    return StoredQuantization("awq", (_grouped("awq", values, where),))


def _read_auto_round(values: Mapping[str, Any], where: str) -> StoredQuantization:
    packing = values.get("packing_format", "auto_round:gptq")
    if not isinstance(packing, str) or packing not in AUTO_ROUND:
        raise CheckpointError(
            f"{where}: packing_format should be one of {', '.join(AUTO_ROUND)}, found {packing!r}; "
            f"{INSTEAD}"
        )
    _refuse(values, where, data_type=("int",), act_bits=(16, 32))
    _refuse(values, where, rotation_config=(), spinquant_config=(), super_bits=())
    layout, offset = AUTO_ROUND[packing]
    base = _grouped(layout, values, where, offset)
    extra = _object(values.get("extra_config"), f"{where}: extra_config")
    overrides = []
    for name, override in extra.items():
        place = f"{where}: extra_config of {name}"
        override = _object(override, place)
        if override.get("bits") not in (16, 32):  # else the matrix is not quantized
            _refuse(override, place, data_type=("int",), super_bits=(), act_bits=(16, 32))
            _refuse(override, place, rotation_config=())
            overrides.append(override)
    formats = _with_overrides(base, values, overrides, f"{where}: extra_config")
    return StoredQuantization("auto-round", formats)


def _grouped(
    layout: Layout, values: Mapping[str, Any], where: str, offset: int = 0
) -> MatrixFormat:
    """Integer codes with one scale per group of inputs; group_size -1 means one per output."""
    bits, size = values.get("bits"), values.get("group_size")
    allowed = (4,) if layout == "awq" else (4, 8)
    if not _is_integer(bits) or bits not in allowed:
        choices = " or ".join(map(str, allowed))
        raise CheckpointError(f"{where}: bits should be {choices}, found {bits!r}; {INSTEAD}")
    if size != -1 and not _is_size(size):
        raise CheckpointError(
            f"{where}: group_size should be -1 or a number of inputs, found {size!r}"
        )
    block = (1, None if size == -1 else size)
    has_order = bool(values.get("desc_act")) and not values.get("static_groups")
    return MatrixFormat(layout, "int", bits, block, offset, has_order=has_order)


def _with_overrides(
    base: MatrixFormat,
    values: Mapping[str, Any],
    overrides: Iterable[Mapping[str, Any]],
    where: str,
) -> tuple[MatrixFormat, ...]:
    """The base format, and the formats of the overrides."""
    others = [
        _grouped(base.layout, {**values, **override}, where, base.zero_point_offset)
        for override in overrides
    ]
    return tuple(dict.fromkeys([base, *others]))


def _read_fine_grained(values: Mapping[str, Any], where: str) -> StoredQuantization:
    """A FineGrainedFP8Config of transformers: fp8 weights, one scale per block."""
    _refuse(values, where, modules_to_convert=(), scale_fmt=("float",), fmt=("e4m3",))
    block = values.get("weight_block_size", [128, 128])
    if block is None:
        block = [None, None]
    elif not (isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))):
        raise CheckpointError(
            f"{where}: weight_block_size should be two numbers, found {block!r}; {INSTEAD}"
        )
    format_ = MatrixFormat("fp8", "float", 8, (block[0], block[1]))
    return StoredQuantization("fp8", (format_,), rounds_activations=True)


def _read_bitsandbytes(values: Mapping[str, Any], where: str) -> LibraryQuantization:
    threshold, skipped = values.get("llm_int8_threshold"), values.get("llm_int8_skip_modules")
    if threshold is not None and not _is_number(threshold):
        raise CheckpointError(
            f"{where}: llm_int8_threshold should be a number, found {threshold!r}"
        )
    if skipped is not None and not _is_names(skipped):
        raise CheckpointError(
            f"{where}: llm_int8_skip_modules should be a list of names, found {skipped!r}"
        )
    _refuse(values, where, bnb_4bit_compute_dtype=COMPUTED, bnb_4bit_quant_storage=("uint8",))
    loads = values.get("load_in_8bit"), values.get("load_in_4bit")
    if loads[0] is True and not loads[1]:
        precision = "bnb-int8"
    elif loads[1] is True and not loads[0] and values.get("bnb_4bit_quant_type") == "nf4":
        precision = "bnb-nf4"
    else:
        raise CheckpointError(
            f"{where}: bitsandbytes should be load_in_8bit, or load_in_4bit "
            f"with bnb_4bit_quant_type 'nf4', found {values!r}; {INSTEAD}"
        )
    known = {key: values[key] for key in BITSANDBYTES if values.get(key) is not None}
    if threshold is not None:
        known["llm_int8_threshold"] = float(threshold)  # transformers takes no int
    return LibraryQuantization("bitsandbytes", precision, known)


def _read_compressed_tensors(
    values: Mapping[str, Any], where: str
) -> StoredQuantization | LibraryQuantization:
    """Groups of matrices, one scheme per group.

    A matrix's tensors show its group, so the patterns in targets and ignore are not evaluated.
    """
    for key in UNREAD:
        if values.get(key) and not (key == "sparsity_config" and _is_dense(values[key])):
            raise CheckpointError(f"{where}: {key} is not read, found {values[key]!r}; {INSTEAD}")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: config_groups should hold a group, found {groups!r}")
    whole = values.get("format")
    formats: dict[MatrixFormat, None] = {}
    reorders = rounds = False
    for name, group in groups.items():
        place = f"{where}: config_groups: {name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"{place}: the group should have weights, found {group!r}")
        _refuse_others(group, GROUP_KEYS, place)
        _refuse_others(group["weights"], WEIGHT_KEYS, f"{place}: weights")
        if group.get("output_activations"):
            raise CheckpointError(
                f"{place}: output_activations should be absent, found "
                f"{group['output_activations']!r}"
            )
        form = group.get("format") or whole
        if whole not in (None, form, "mixed-precision"):
            raise CheckpointError(f"{where}: format is {whole!r}, in the group {form!r}")
        formats[_read_weights(group["weights"], form, place)] = None
        reorders |= group["weights"].get("actorder") in REORDERED
        rounds |= bool(group.get("input_activations"))
    stored = StoredQuantization("compressed-tensors", tuple(formats), reorders, rounds)
    if len(groups) == 1:
        return _run_by_library(values, group, stored, where) or stored
    return stored


def _is_dense(sparsity: Any) -> bool:
    """Whether a sparsity_config says that no tensor is stored in a sparse form."""
    return isinstance(sparsity, dict) and sparsity.get("format") == "dense"


def _read_weights(weights: Mapping[str, Any], form: Any, where: str) -> MatrixFormat:
    """A group's weights (compressed_tensors.quantization.QuantizationArgs) to a format."""
    if not isinstance(form, str) or form not in FORMATS:
        raise CheckpointError(
            f"{where}: format should be one of {', '.join(FORMATS)}, found {form!r}; {INSTEAD}"
        )
    layout, known = FORMATS[form]
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if not _is_integer(bits) or (kind, bits) not in known:
        choices = " or ".join(f"{kind} of {bits} bits" for kind, bits in known)
        raise CheckpointError(
            f"{where}: weights in {form} should be {choices}, found {kind!r} of {bits!r}; {INSTEAD}"
        )
    if kind == "float" and not weights.get("symmetric", True):
        raise CheckpointError(
            f"{where}: weights of type float should be symmetric, found symmetric "
            f"{weights['symmetric']!r}; {INSTEAD}"
        )
    if weights.get("dynamic"):
        raise CheckpointError(
            f"{where}: weights should not be dynamic, found {weights['dynamic']!r}"
        )
    actorder = weights.get("actorder")
    if actorder not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise CheckpointError(f"{where}: actorder should be weight or group, found {actorder!r}")
    has_zero_points = not weights.get("symmetric", True) if kind == "int" else None
    block, has_order = _read_block(weights, where), actorder in REORDERED
    return MatrixFormat(layout, kind, bits, block, 0, has_zero_points, has_order)


def _read_block(weights: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """(outputs, inputs) that share a scale, from strategy, or from group_size without one."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy in ("group", "tensor_group") and _is_size(size):
        return 1, size
    if strategy == "block" and isinstance(structure, str):  # "128x128", the older notation
        sizes = structure.split("x")
        structure = [int(text) if text.isdecimal() and len(text) < 9 else 0 for text in sizes]
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        height, width = structure
        if _is_size(height) and _is_size(width):
            return height, width
    raise CheckpointError(
        f"{where}: weights should have strategy tensor, channel, group with a group_size, or block "
        f"with a block_structure, found {strategy!r}, {size!r} and {structure!r}"
    )


def _run_by_library(
    values: Mapping[str, Any], group: Mapping[str, Any], stored: StoredQuantization, where: str
) -> LibraryQuantization | None:
    """8-bit weights and activations of the same type, run by compressed-tensors; None if not."""
    if values.get("format") not in LIBRARY_FORMATS:
        return None
    kinds = [
        (args.get("type", "int"), args.get("num_bits", 8)) if isinstance(args, dict) else None
        for args in (group["weights"], group.get("input_activations"))
    ]
    if kinds[0] != kinds[1] or kinds[0] not in SCHEMES:
        return None
    ignored, targets = values.get("ignore") or [], group.get("targets")
    for names in (ignored, targets):
        if not _is_names(names):
            raise CheckpointError(
                f"{where}: ignore and targets should be lists of names, found {names!r}"
            )
    known = {key: group.get(key) for key in ("targets", "weights", "input_activations", "format")}
    return LibraryQuantization(
        "compressed-tensors",
        SCHEMES[kinds[0]],
        {
            "quant_method": "compressed-tensors",
            "format": values["format"],
            "quantization_status": "compressed",
            "ignore": ignored,
            "config_groups": {"group_0": known},
        },
        stored,
    )


def _one_of(
    values: Mapping[str, Any], where: str, keys: tuple[str, ...], known: tuple[str, ...]
) -> str:
    """The layout named under any of several keys; the first known one if none is there."""
    given = {key: values[key] for key in keys if values.get(key) is not None}
    names = {name.lower() if isinstance(name, str) else repr(name) for name in given.values()}
    if len(names) > 1 or not names <= {*known}:
        raise CheckpointError(
            f"{where}: {' and '.join(given)} should be {' or '.join(map(repr, known))}, found "
            f"{' and '.join(map(repr, given.values()))}; {INSTEAD}"
        )
    return names.pop() if names else known[0]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and 1 <= value <= LARGEST_BLOCK


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} should be an object, found {value!r}")
    return value


def _refuse(values: Mapping[str, Any], where: str, **known: tuple[Any, ...]) -> None:
    """Refuse keys with values other than those known; null and empty values are ignored."""
    for key, allowed in known.items():
        if (value := values.get(key)) and value not in allowed:
            words = " or ".join(map(repr, allowed)) or "absent"
            raise CheckpointError(f"{where}: {key} should be {words}, found {value!r}; {INSTEAD}")


def _refuse_others(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse keys other than those known; null and empty values are ignored."""
    for key, value in values.items():
        if value and key not in known:
            raise CheckpointError(f"{where}: {key} is not known, found {value!r}; {INSTEAD}")
