"""Quantized checkpoints in the formats of bitsandbytes, AutoGPTQ and compressed-tensors."""

from .methods import Options
from .quantize import estimate_checkpoint, quantize_checkpoint

__all__ = ["Options", "estimate_checkpoint", "quantize_checkpoint"]
