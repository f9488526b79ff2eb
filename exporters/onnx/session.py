"""onnxruntime sessions that take no more memory than their graph's weights, and give it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...errors import require
from ...runtimes.compiled import register_kernels


def open_session(model: ir.Model, folder: Path, *, pack: bool, kernels: bool = False) -> Any:
    """A CPU session of a graph whose weights are in files.

    Args:
        model: The graph.
        folder: Where its external data is.
        pack: Whether weights are copied into the layout that is fastest to multiply: worth it for
            many runs. Otherwise they stay mapped, and nodes run as they are written.
        kernels: Whether the package's kernels run, where they can, as in `embedport.load`.
    """
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The arena would keep what each session's largest run took.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if kernels:
        register_kernels(options)
    graph = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
