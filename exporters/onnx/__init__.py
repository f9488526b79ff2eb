"""ONNX graphs of Qwen3, built from the checkpoint, not traced."""

from .export import estimate_onnx
from .plan import Options

__all__ = ["Options", "estimate_onnx"]
