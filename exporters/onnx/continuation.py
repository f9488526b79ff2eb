"""A reranker's second graph: rows that continue a past, with the weights of the first.

    onnx/model.onnx          what other software opens: two inputs
    onnx/continuation.onnx   the same with a past, for this package's runtime: a query's documents
                             continue from the keys and values of what they all begin with
    onnx/model.onnx_data     the weights of both

With an empty past it computes what the first computes, so a runtime needs one of them only.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...errors import require
from ...manifest import ContinuationRecord
from ...requirements import meets
from .graph import Design, build_model

CONTINUATION = "onnx/continuation.onnx"


def plan_continuation(design: Design) -> ContinuationRecord | None:
    """What a design's continuation is; None if it gets none.

    A reranker in fp32 arithmetic, as CPUs run it, gets one, if the onnxruntime that has to check it
    takes it, unless attention has a mask. An embedding's texts begin alike only by their
    short prompts. 16-bit graphs are for GPUs, where the continuation has not been measured.
    """
    needs = design.dialect.continues
    if design.head is None or needs is None or design.spec.masked_layers:
        return None
    if design.precision.compute != ir.DataType.FLOAT:
        return None
    if not meets(needs, require("onnxruntime", "cpu").__version__):
        return None
    return ContinuationRecord(CONTINUATION, needs)


def write_continuation(design: Design, graph: Path, path: Path) -> None:
    """Write the continuation of a graph.

    Args:
        design: What the graph was built from.
        graph: The graph, written.
        path: Beside it.
    """
    weights = ir.load(graph).graph.initializers
    model = build_model(design, continues=True)
    for name, value in model.graph.initializers.items():
        # Constants are small, and numbered anew.
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = weights[name].const_value
    ir.save(model, path)
