"""Read bitsandbytes' NF4 matrices as they are stored.

A matrix X [out, in] has X.weight uint8 [out * in / 2, 1], the first code of a byte in its upper
half; X.weight.absmax, a scale for each `blocksize` weights; X.weight.quant_map, the 16 values; and
X.weight.quant_state.bitsandbytes__nf4, JSON. With double quantization absmax is uint8, an index of
nested_quant_map, times nested_absmax of its block, plus nested_offset
(bitsandbytes.functional.QuantState).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...checkpoint.quantization_config import GRAPH_GROUPS, LibraryQuantization
from ...checkpoint.spec import ModelSpec
from ...checkpoint.tensor_files import TensorInfo, find_tensor, read_headers
from ..bitsandbytes_parts import find_problem, read_state
from ..checkpoint import read_stored


@dataclass(frozen=True)
class Nf4:
    """A matrix: codes uint8 [out, in], scales float32 [groups, out], levels float32 [16]."""

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor
    group: int


def has_nf4_matrices(spec: ModelSpec) -> bool:
    """Whether all projections that are quantized are NF4 in whole blocks of 32, 64 or 128."""
    quantization = spec.quantization
    if not isinstance(quantization, LibraryQuantization) or quantization.precision != "bnb-nf4":
        return False
    headers = read_headers(spec.source.folder)
    return all(
        _is_plain(headers, name) or _fits(headers, name, shape)
        for name, shape in spec.tensor_shapes().items()
        if "_proj." in name and len(shape) == 2
    )


def read_nf4(headers: Mapping[str, TensorInfo], matrix: str, shape: tuple[int, ...]) -> Nf4 | None:
    """Read a matrix of a checkpoint that `has_nf4_matrices`; None if it is not quantized.

    Args:
        headers: The checkpoint's tensors.
        matrix: Its name, without ".weight".
        shape: (out, in).
    """
    name = f"{matrix}.weight"
    if _is_plain(headers, name):
        return None
    state = read_state(headers, name)
    outputs, width = shape
    stored = read_stored(headers, name).view(outputs, width // 2)
    group = int(state["blocksize"])
    absmax = read_stored(headers, f"{name}.absmax")
    if absmax.dtype == torch.uint8:
        levels = read_stored(headers, f"{name}.nested_quant_map")[absmax.long()]
        nested = read_stored(headers, f"{name}.nested_absmax")
        factors = nested.repeat_interleave(int(state["nested_blocksize"]))[: len(absmax)]
        absmax = levels * factors + float(state["nested_offset"])
    scales = absmax.float().view(outputs, width // group).t().contiguous()
    codes = torch.stack([stored >> 4, stored & 15], dim=2).flatten(1)
    return Nf4(codes, scales, read_stored(headers, f"{name}.quant_map").float(), group)


def _is_plain(headers: Mapping[str, TensorInfo], name: str) -> bool:
    info = find_tensor(headers, name)
    return info is not None and info.dtype in ("BF16", "F16", "F32")


def _fits(headers: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix's parts are those that `read_nf4` reads."""
    state = read_state(headers, name)
    if state.get("blocksize") not in GRAPH_GROUPS or shape[1] % state["blocksize"]:
        return False
    return find_problem(headers, name, shape, state) is None
