"""Quantized checkpoints in the formats of bitsandbytes, AutoGPTQ and compressed-tensors."""

from .quantize import quantize_checkpoint

__all__ = ["quantize_checkpoint"]
