"""What a checkpoint's `quantization_config` says of its matrices.

Packed codes that are read here: AutoGPTQ and its successor GPTQModel (quant_method "gptq";
checkpoint_format "gptq" stores each zero point less one, "gptq_v2" as it is), AutoAWQ (quant_method
"awq", version "gemm"), compressed-tensors' "pack-quantized", weights only.

Formats that their own library runs: bitsandbytes, compressed-tensors with quantized activations. Of
their configuration only what is known here is handed on: compressed-tensors takes some names for
paths of Python files, and runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError

Method = Literal["gptq", "awq", "compressed-tensors"]
ZERO_POINT_OFFSETS = {"gptq": 1, "gptq_v2": 0}
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
# compressed-tensors' 8-bit weights and activations: their type and bits to the precision's name.
SCHEMES = {("int", 8): "w8a8", ("float", 8): "fp8"}
LIBRARY_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
UNREAD = ("sparsity_config", "transform_config", "kv_cache_scheme")


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint's projections are quantized; all else is stored as numbers.

    Attributes:
        method: "gptq", "awq" or "compressed-tensors": how the codes are packed.
        bits: Of a code, 4 or 8.
        group_size: Inputs that share a scale and a zero point.
        zero_point_offset: What is added to a stored zero point.
    """

    method: Method
    bits: int
    group_size: int
    zero_point_offset: int


@dataclass(frozen=True)
class LibraryQuantization:
    """A checkpoint in a format that only its own library reads.

    Attributes:
        method: "bitsandbytes" or "compressed-tensors".
        precision: "bnb-int8", "bnb-nf4", "w8a8" or "fp8".
        values: What the library is told: a `quantization_config` without what is not known here.
    """

    method: Literal["bitsandbytes", "compressed-tensors"]
    precision: str
    values: Mapping[str, Any]


def read_quantization(
    values: Mapping[str, Any] | None, path: Path
) -> StoredQuantization | LibraryQuantization | None:
    """Read a `quantization_config`; None where there is none.

    Args:
        values: The object in config.json.
        path: The config.json, for errors.

    Raises:
        CheckpointError: It is none that is read here.
    """
    if not values:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: quantization_config should be an object, found {values!r}")
    method = values.get("quant_method")
    if method == "bitsandbytes":
        return _read_bitsandbytes(values, path)
    if method == "compressed-tensors":
        return _read_compressed_tensors(values, path)
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"{path}: a checkpoint quantized by {method!r} (quantization_config) is not read, only "
            "by 'gptq', 'awq', 'bitsandbytes' and 'compressed-tensors'; give the original in bf16, "
            "fp16 or fp32"
        )
    bits, group_size = values.get("bits"), values.get("group_size")
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise CheckpointError(
            f"{path}: quantization_config: bits should be 4 (or 8 by 'gptq'), found {bits!r}"
        )
    if group_size not in (32, 64, 128):
        raise CheckpointError(
            f"{path}: quantization_config: group_size should be 32, 64 or 128, found {group_size!r}"
        )
    if method == "awq":
        version = str(values.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(
                f"{path}: quantization_config: AWQ's version should be 'gemm', found {version!r}"
            )
        return StoredQuantization("awq", bits, group_size, 0)
    form = values.get("checkpoint_format", "gptq")
    if form not in ZERO_POINT_OFFSETS:
        raise CheckpointError(
            f"{path}: quantization_config: checkpoint_format should be 'gptq' or 'gptq_v2', "
            f"found {form!r}"
        )
    return StoredQuantization("gptq", bits, group_size, ZERO_POINT_OFFSETS[form])


def _read_bitsandbytes(values: Mapping[str, Any], path: Path) -> LibraryQuantization:
    if values.get("load_in_8bit") is True:
        precision = "bnb-int8"
    elif values.get("load_in_4bit") is True and values.get("bnb_4bit_quant_type") == "nf4":
        precision = "bnb-nf4"
    else:
        raise CheckpointError(
            f"{path}: quantization_config: bitsandbytes should be load_in_8bit, or load_in_4bit "
            f"with bnb_4bit_quant_type 'nf4', found {values!r}"
        )
    known = {key: values[key] for key in BITSANDBYTES if key in values}
    return LibraryQuantization("bitsandbytes", precision, known)


def _read_compressed_tensors(
    values: Mapping[str, Any], path: Path
) -> StoredQuantization | LibraryQuantization:
    """One group of matrices, all of one scheme."""
    where = f"{path}: quantization_config"
    for key in UNREAD:
        if values.get(key):
            raise CheckpointError(f"{where}: {key} is not read, found {values[key]!r}")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(f"{where}: config_groups should hold one group, found {groups!r}")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where}: the group should have weights, found {group!r}")
    form = values.get("format")
    if group.get("format") not in (None, form):
        raise CheckpointError(f"{where}: format is {form!r}, in the group {group['format']!r}")
    if form == "pack-quantized":
        return _read_packed(group, where)
    if form not in LIBRARY_FORMATS:
        raise CheckpointError(
            f"{where}: format should be one of pack-quantized, {', '.join(LIBRARY_FORMATS)}, found "
            f"{form!r}; give the original in bf16, fp16 or fp32"
        )
    return _read_activations(values, group, where)


def _read_packed(group: Mapping[str, Any], where: str) -> StoredQuantization:
    """4 or 8 bits in groups of the same size; activations as they are."""
    weights = group["weights"]
    if group.get("input_activations") is not None:
        raise CheckpointError(f"{where}: only weights should be quantized, found {group!r}")
    bits, group_size = weights.get("num_bits"), weights.get("group_size")
    if bits not in (4, 8) or weights.get("type") != "int":
        raise CheckpointError(
            f"{where}: weights should be int of 4 or 8 bits, found {weights.get('type')!r} of "
            f"{bits!r}"
        )
    if group_size not in (32, 64, 128) or weights.get("actorder"):
        raise CheckpointError(
            f"{where}: group_size should be 32, 64 or 128 without actorder, found {group_size!r} "
            f"and {weights.get('actorder')!r}"
        )
    return StoredQuantization("compressed-tensors", bits, group_size, 0)


def _read_activations(
    values: Mapping[str, Any], group: Mapping[str, Any], where: str
) -> LibraryQuantization:
    """8 bits, weights and activations."""
    kinds = [
        (each.get("type"), each.get("num_bits")) if isinstance(each, dict) else None
        for each in (group["weights"], group.get("input_activations"))
    ]
    if kinds[0] != kinds[1] or kinds[0] not in SCHEMES or group.get("output_activations"):
        raise CheckpointError(
            f"{where}: weights and input_activations should be int or float of 8 bits, and "
            f"output_activations absent, found {group!r}"
        )
    names, targets = values.get("ignore") or [], group.get("targets")
    for each in (names, targets):
        if not isinstance(each, list) or not all(isinstance(name, str) for name in each):
            raise CheckpointError(
                f"{where}: ignore and targets should be lists of names, found {each!r}"
            )
    told = {key: group.get(key) for key in ("targets", "weights", "input_activations", "format")}
    return LibraryQuantization(
        "compressed-tensors",
        SCHEMES[kinds[0]],
        {
            "quant_method": "compressed-tensors",
            "format": values["format"],
            "quantization_status": "compressed",
            "ignore": names,
            "config_groups": {"group_0": told},
        },
    )
