"""TensorRT engines, built from graphs of the standard dialect."""

from .build import obstacle
from .export import PROFILES, export_tensorrt

__all__ = ["PROFILES", "export_tensorrt", "obstacle"]
