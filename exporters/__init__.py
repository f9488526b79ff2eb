"""Exporters: write a checkpoint in a format that a runtime executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact.folder import Artifact
from ..errors import InputError
from .checkpoints import quantize_checkpoint
from .onnx import export_onnx
from .tensorrt import export_tensorrt

__all__ = ["export", "export_onnx", "export_tensorrt", "quantize_checkpoint"]

FORMATS = {"onnx": export_onnx, "tensorrt": export_tensorrt}


def export(
    checkpoint: str | Path, output: str | Path, *, format: str = "onnx", **options: Any
) -> Artifact:
    """Export a checkpoint to an artifact.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id.
        output: The artifact's folder.
        format: "onnx" or "tensorrt".
        options: Keyword arguments of `export_onnx` or `export_tensorrt`.

    Returns:
        The artifact.

    Raises:
        InputError: The format is unknown. The format's function raises further errors.

    >>> artifact = export(checkpoint, folder / "tea-int8", precision="int8")
    >>> artifact.manifest.task, artifact.manifest.precision
    ('embedding', 'int8')
    """
    if format not in FORMATS:
        raise InputError(f"format should be one of {', '.join(FORMATS)}, found {format!r}")
    return FORMATS[format](checkpoint, output, **options)
