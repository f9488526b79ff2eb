"""TensorRT engines, built from graphs of the standard dialect."""

from .export import export_tensorrt

__all__ = ["export_tensorrt"]
