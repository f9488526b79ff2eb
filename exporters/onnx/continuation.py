"""A reranker's second graph: its rows continue a shared prefix, with the first graph's weights.

    onnx/model.onnx          the graph that other software opens: two inputs
    onnx/continuation.onnx   the same with a past, for this package's runtime: a query's documents
                             continue from the keys and values of their shared prefix
    onnx/model.onnx_data     the weights of both

With an empty past it computes the same as the first graph, so a runtime needs only one of them.
"""

from __future__ import annotations

import onnx_ir as ir

from ...artifact.manifest import ContinuationRecord
from ...errors import require
from ...requirements import meets
from ..graph.qwen3 import Design

CONTINUATION = "onnx/continuation.onnx"


def plan_continuation(design: Design) -> ContinuationRecord | None:
    """Plan a design's continuation graph; None if it gets none.

    A reranker in fp32, for CPUs, gets one if the installed onnxruntime can run and check it, and
    if attention has no mask. An embedder's texts share only their short prompts. 16-bit graphs are
    for GPUs, where the continuation has not been measured.
    """
    needs = design.dialect.continues
    if design.head is None or needs is None or design.spec.masked_layers:
        return None
    if design.precision.compute != ir.DataType.FLOAT:
        return None
    if not meets(needs, require("onnxruntime", "cpu").__version__):
        return None
    return ContinuationRecord(CONTINUATION, needs)
