"""embedport: export, quantize, validate and run Qwen3 embedding and reranker checkpoints.

    embedport.export("Qwen/Qwen3-Embedding-0.6B", "qwen3-fp32")
    embedder = embedport.load_embedder("qwen3-fp32")
    vectors = embedder.encode(["What is the capital of China?"], prompt="query")
    report = embedport.validate("qwen3-fp32", reference="Qwen/Qwen3-Embedding-0.6B")

The folders at the repository's top level are subpackages: `exporters/` is imported as
`embedport.exporters`, and so on. The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .artifact.folder import Artifact
    from .calibration import build_calibration
    from .checkpoint.spec import ModelSpec
    from .errors import EmbedportError
    from .exporters import export, export_tensorrt, quantize_checkpoint
    from .exporters.onnx.stored import export_stored as export_stored
    from .runtimes import (
        Check,
        Embedder,
        Ranked,
        Reranker,
        check,
        load,
        load_embedder,
        load_reranker,
    )
    from .texts.prompts import query_prompt
    from .validation import Report, mteb_model, record_reference, validate

_HOMES = {
    "Artifact": "artifact.folder",
    "Check": "runtimes",
    "EmbedportError": "errors",
    "Embedder": "runtimes",
    "ModelSpec": "checkpoint.spec",
    "Ranked": "runtimes",
    "Report": "validation",
    "Reranker": "runtimes",
    "build_calibration": "calibration",
    "check": "runtimes",
    "export": "exporters",
    "export_tensorrt": "exporters",
    # Not public. The runtimes ask for it here, since they may not import the exporters.
    "export_stored": "exporters.onnx.stored",
    "load": "runtimes",
    "load_embedder": "runtimes",
    "load_reranker": "runtimes",
    "mteb_model": "validation",
    "quantize_checkpoint": "exporters",
    "query_prompt": "texts.prompts",
    "record_reference": "validation",
    "validate": "validation",
}

__all__ = [
    "Artifact",
    "Check",
    "Embedder",
    "EmbedportError",
    "ModelSpec",
    "Ranked",
    "Report",
    "Reranker",
    "__version__",
    "build_calibration",
    "check",
    "export",
    "export_tensorrt",
    "load",
    "load_embedder",
    "load_reranker",
    "mteb_model",
    "quantize_checkpoint",
    "query_prompt",
    "record_reference",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'embedport' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
