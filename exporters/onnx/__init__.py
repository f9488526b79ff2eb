"""ONNX graphs of Qwen3, built from the checkpoint, not traced."""

from .export import export_onnx

__all__ = ["export_onnx"]
