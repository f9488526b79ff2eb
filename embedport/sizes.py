"""What a graph's bytes are spent on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

# An initializer's name to the part of the model that it belongs to.
PARTS = {
    "embedding table": re.compile(r"embed_tokens\."),
    "attention": re.compile(r"layers\.\d+\.self_attn\.[qkvo]_proj\."),
    "SwiGLU": re.compile(r"layers\.\d+\.mlp\."),
    "norms": re.compile(r".*norm\.weight"),
}
REST = "output and constants"


def graph_sizes(path: Path) -> Mapping[str, Mapping[str, int]]:
    """Bytes of a graph's weights by part of the model and by dtype ("float", "int8", …).

    Scales and zero points count under the dtype they have. Only the graph's structure is read.
    """
    sizes: dict[str, dict[str, int]] = {}
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        part = next((part for part, names in PARTS.items() if names.match(name)), REST)
        dtype = tensor.dtype.name.lower()
        by_dtype = sizes.setdefault(part, {})
        by_dtype[dtype] = by_dtype.get(dtype, 0) + tensor.nbytes
    return sizes
