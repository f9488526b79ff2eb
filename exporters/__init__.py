"""Exporters: write a checkpoint in a format that a runtime executes."""

from .checkpoints import quantize_checkpoint
from .onnx.export import export
from .tensorrt import export_tensorrt

__all__ = ["export", "export_tensorrt", "quantize_checkpoint"]
