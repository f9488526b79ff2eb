"""What a checkpoint's `quantization_config` says of its matrices: GPTQ's and AWQ's packed codes.

Formats: AutoGPTQ and its successor GPTQModel (quant_method "gptq"; checkpoint_format "gptq" stores
each zero point less one, "gptq_v2" as it is), AutoAWQ (quant_method "awq", version "gemm").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError

Method = Literal["gptq", "awq"]
ZERO_POINT_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint's projections are quantized; all else is stored as numbers.

    Attributes:
        method: "gptq" or "awq": how the codes are packed.
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
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"{path}: a checkpoint quantized by {method!r} (quantization_config) is not read, only "
            "by 'gptq' and 'awq'; give the original in bf16, fp16 or fp32"
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
