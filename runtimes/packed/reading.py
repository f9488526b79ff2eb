"""Read a checkpoint's matrices onto a CUDA device, quantized as they are stored."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...checkpoint.quantization_config import LibraryQuantization, StoredQuantization
from ...checkpoint.spec import ModelSpec
from ...checkpoint.tensor_files import read_headers
from ...quantize.stored import StoredWeights, warn_of_activations
from ..checkpoint import Read, open_readers, read_tensor
from .matrices import Matrix, PackedMatrix, PlainMatrix, ScaledMatrix, pack, stack
from .nf4 import read_nf4

logger = logging.getLogger(__name__)

# Matrices that read the same rows, in each layer.
STACKS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors for a device.

    Attributes:
        rows: The dtype in which matrices take their rows: float8_e4m3fn and int8 come with scales.
        read: Reads a tensor that is no matrix by its name in `spec.tensor_shapes()`, on the CPU.
        matrix: Reads a projection, by its name without ".weight", onto the device.
    """

    rows: torch.dtype
    read: Read
    matrix: Callable[[str], Matrix]

    def stacked(self, names: Sequence[str]) -> Matrix:
        """Read projections that take the same rows as one matrix."""
        return stack([self.matrix(name) for name in names])


def open_checkpoint(spec: ModelSpec, dtype: torch.dtype, device: str) -> Checkpoint:
    """Open a checkpoint; its matrices stay as they are stored if a product takes their format.

    Codes of 4 and 8 bits in groups stay packed, and so does NF4. Other formats are unpacked to
    `dtype`, and a warning names one.

    Args:
        spec: A checkpoint for which `why_padded` gives None.
        dtype: torch.float16 or torch.bfloat16, of everything that is not quantized.
        device: "cuda"; tests use "cpu".

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
    """
    quantization = spec.quantization
    if isinstance(quantization, StoredQuantization):
        return _open_stored(spec, dtype, device)
    read, read_scales = open_readers(spec)
    if isinstance(quantization, LibraryQuantization) and quantization.method == "bitsandbytes":
        return _open_nf4(spec, read, dtype, device)

    def matrix(name: str) -> Matrix:
        weight = read(f"{name}.weight").to(device)
        if read_scales is None:
            return PlainMatrix(weight.to(dtype))
        scales = read_scales(name).to(device, torch.float32)
        return ScaledMatrix(weight.contiguous(), scales.t().contiguous())

    if read_scales is None:
        return Checkpoint(dtype, read, matrix)
    form = torch.int8 if quantization is not None and quantization.precision == "w8a8" else None
    return Checkpoint(form or torch.float8_e4m3fn, read, matrix)


def _open_stored(spec: ModelSpec, dtype: torch.dtype, device: str) -> Checkpoint:
    weights = StoredWeights(spec)
    warn_of_activations(spec)
    unpacked = sorted(weights.formats.keys() - weights.schemes.keys())
    if unpacked:
        logger.warning(
            "%s: unpacked to 16 bits: %s and %d others (%s)",
            spec.source.folder,
            unpacked[0],
            len(unpacked) - 1,
            " and ".join(weights.describe()),
        )
    read = partial(read_tensor, torch, weights)
    buffer = _buffer(spec, dtype, device) if weights.schemes else torch.empty(0)

    def matrix(name: str) -> Matrix:
        if name not in weights.schemes:
            return PlainMatrix(read(f"{name}.weight").to(device, dtype))
        tensor = weights.read_quantized(name)
        scheme = tensor.scheme
        assert scheme.group_size is not None
        zeros = None
        if not scheme.symmetric:
            zeros = torch.from_numpy(tensor.zero_points).to(device).t().contiguous()
        return PackedMatrix(
            pack(torch.from_numpy(tensor.codes).to(device), scheme.bits, scheme.group_size),
            _narrowed(torch.from_numpy(tensor.scales).to(device).t().contiguous()),
            zeros,
            None,
            scheme.bits,
            scheme.group_size,
            tensor.codes.shape[1],
            buffer,
        )

    return Checkpoint(dtype, read, matrix)


def _open_nf4(spec: ModelSpec, read: Read, dtype: torch.dtype, device: str) -> Checkpoint:
    headers, shapes = read_headers(spec.source.folder), spec.tensor_shapes()
    buffer = _buffer(spec, dtype, device)

    def matrix(name: str) -> Matrix:
        shape = shapes[f"{name}.weight"]
        nf4 = read_nf4(headers, name, shape)
        if nf4 is None:
            return PlainMatrix(read(f"{name}.weight").to(device, dtype))
        return PackedMatrix(
            pack(nf4.codes.to(device), 4, nf4.group),
            nf4.scales.to(device),
            None,
            nf4.levels.to(device),
            4,
            nf4.group,
            shape[1],
            buffer,
        )

    return Checkpoint(dtype, read, matrix)


def _buffer(spec: ModelSpec, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Memory for the largest matrix of a layer in 16 bits."""
    shapes = spec.tensor_shapes()
    sizes = [
        sum(math.prod(shapes[f"layers.0.{name}.weight"]) for name in names) for names in STACKS
    ]
    return torch.empty(max(sizes), dtype=dtype, device=device)


def _narrowed(scales: torch.Tensor) -> torch.Tensor:
    """Scales in the 16-bit dtype that holds them exactly; as they are if none does."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales
