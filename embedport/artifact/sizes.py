"""Measures a model's size by part (embedding table, attention, …) and dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from ..checkpoint.tensor_files import read_headers

# Part of the model to the names of its tensors.
PARTS = {
    "embedding table": re.compile(r"embed_tokens\."),
    "attention": re.compile(r"layers\.\d+\.self_attn\.[qkvo]_proj\."),
    "SwiGLU": re.compile(r"layers\.\d+\.mlp\."),
    "norms": re.compile(r".*norm\.weight"),
}
REST = "output and constants"


def graph_sizes(path: Path) -> Mapping[str, Mapping[str, int]]:
    """Bytes of a graph's weights by part of the model and by dtype ("float", "int8", …).

    Scales and zero points count under their own dtype. Only the graph's structure is read.
    """
    tensors = []
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        tensors.append((name, tensor.dtype.name.lower(), tensor.nbytes))
    return _sum(tensors)


def checkpoint_sizes(folder: Path) -> Mapping[str, Mapping[str, int]]:
    """Bytes of a checkpoint's tensors by part of the model and by dtype ("bf16", "i8", …)."""
    return _sum(
        (info.name.removeprefix("model."), info.dtype.lower(), info.nbytes)
        for info in read_headers(folder).values()
    )


def _sum(tensors: Iterable[tuple[str, str, int]]) -> Mapping[str, Mapping[str, int]]:
    """Add up tensors, each given as (name, dtype, bytes)."""
    sizes: dict[str, dict[str, int]] = {}
    for name, dtype, nbytes in tensors:
        part = next((part for part, names in PARTS.items() if names.match(name)), REST)
        by_dtype = sizes.setdefault(part, {})
        by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
    return sizes
