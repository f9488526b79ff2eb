"""What a checkpoint's `quantization_config` says of its matrices: packed codes in groups.

Formats: AutoGPTQ and its successor GPTQModel (quant_method "gptq"; checkpoint_format "gptq" stores
each zero point less one, "gptq_v2" as it is), AutoAWQ (quant_method "awq", version "gemm"), and
compressed-tensors' "pack-quantized", weights only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError

Method = Literal["gptq", "awq", "compressed-tensors"]
ZERO_POINT_OFFSETS = {"gptq": 1, "gptq_v2": 0}


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


def read_quantization(values: Mapping[str, Any] | None, path: Path) -> StoredQuantization | None:
    """Read a `quantization_config`; None where there is none.

    Args:
        values: The object in config.json.
        path: The config.json, for errors.

    Raises:
        CheckpointError: It is none that is read here.
    """
    if not values:
        return None
    method = values.get("quant_method")
    if method == "compressed-tensors":
        return _read_compressed_tensors(values, path)
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"{path}: a checkpoint quantized by {method!r} (quantization_config) is not read, only "
            "by 'gptq', 'awq' and 'compressed-tensors'; give the original in bf16, fp16 or fp32"
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


def _read_compressed_tensors(values: Mapping[str, Any], path: Path) -> StoredQuantization:
    """One group of weights in 4 or 8 bits, all of the same size; activations as they are."""
    where = f"{path}: quantization_config"
    if values.get("format") != "pack-quantized":
        raise CheckpointError(
            f"{where}: format should be 'pack-quantized', found {values.get('format')!r}; give the "
            "original in bf16, fp16 or fp32"
        )
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(f"{where}: config_groups should hold one group, found {groups!r}")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("input_activations") is not None:
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
