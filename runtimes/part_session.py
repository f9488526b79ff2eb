"""CPU sessions of parts of a graph, which use no more memory than their weights and release it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..artifact.folder import Artifact
from ..errors import require
from .batching import limit_threads
from .exact import make_exact
from .ort_custom_ops import register_kernels


def open_session(
    model: ir.Model,
    folder: Path,
    *,
    pack: bool,
    kernels: bool = False,
    artifact: Artifact | None = None,
) -> Any:
    """Open a CPU session of a graph with external weights.

    Args:
        model: The graph.
        folder: The folder of its external data.
        pack: Whether to copy weights into the layout that multiplies fastest, which pays off after
            many runs. Otherwise weights stay memory-mapped and the graph is not optimized.
        kernels: Whether to use the package's kernels, if they run here, as `embedport.load` does.
        artifact: The artifact that the graph is from, if its products may saturate on this CPU:
            they are then computed exactly, as `embedport.load` does.
    """
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    limit_threads(options)
    # The arena would keep the memory of each session's largest run.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if kernels:
        register_kernels(options)
    if artifact is not None:
        make_exact(options, artifact)
    graph = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
