"""Quantized checkpoints in the formats of bitsandbytes, AutoGPTQ and compressed-tensors."""

from .quantize import estimate_checkpoint, quantize_checkpoint

__all__ = ["estimate_checkpoint", "quantize_checkpoint"]
