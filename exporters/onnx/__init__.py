"""ONNX graphs of Qwen3, built from the checkpoint, not traced."""

from .export import estimate_onnx, export_onnx

__all__ = ["estimate_onnx", "export_onnx"]
