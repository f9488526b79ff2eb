"""Session options that make 8-bit products exact on this CPU.

int8 artifacts are exact on every CPU because their codes are limited in pairs (`quantize.pairs`).
Artifacts of an earlier embedport have no such limit: on an x86 CPU without VNNI, onnxruntime
multiplies uint8 by int8 with an instruction that saturates. The options here select its slower,
exact products instead.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np

from ..artifact.folder import Artifact
from ..errors import require

logger = logging.getLogger(__name__)

# By dialect: "ort" takes weights as uint8 (which fails on QuantizeLinear graphs in onnxruntime
# 1.32); "standard" runs DequantizeLinear and a product in fp32.
UNSATURATED = {"ort": "session.x64quantprecision", "standard": "session.disable_quant_qdq"}
# KleidiAI rounds activations with one scale per token; MatMulNBits has one per group.
NO_KLEIDIAI = "mlas.disable_kleidiai"


def make_exact(options: Any, artifact: Artifact) -> None:
    """Set the options for exact products of an artifact; warn if they cost speed.

    Args:
        options: onnxruntime.SessionOptions.
        artifact: An artifact with a graph.
    """
    graph, recipe = artifact.manifest.graph, artifact.manifest.recipe
    assert graph is not None
    formats = set() if recipe is None else set(recipe["formats"].values())
    if any(name.startswith("int4/") and name.endswith("s") for name in formats):
        options.add_session_config_entry(NO_KLEIDIAI, "1")
    if "int8" in formats and not graph.limits_pairs and saturates():
        options.add_session_config_entry(UNSATURATED[graph.dialect], "1")
        logger.warning(
            "%s: made by an earlier embedport, its 8-bit products would saturate on this CPU, "
            "which has no VNNI; they are computed exactly instead, slower. Export it again: the "
            "codes written now are exact and fast on every CPU",
            artifact.folder,
        )


@cache
def saturates() -> bool:
    """Whether onnxruntime's uint8 x int8 products saturate on this CPU, tested by running some."""
    import onnx_ir as ir

    width, outputs = 64, 16
    x = ir.val("x", dtype=ir.DataType.UINT8, shape=(None, width))
    codes = ir.tensor(np.full((width, outputs), 127, np.int8), name="codes")
    weights = ir.val("codes", const_value=codes)
    out = ir.val("product", dtype=ir.DataType.INT32, shape=(None, outputs))
    node = ir.node("MatMulInteger", [x, weights], outputs=[out])
    graph = ir.Graph(
        [x], [out], nodes=[node], initializers=[weights], opset_imports={"": 23}, name="product"
    )
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # onnxruntime has separate kernels for one row and for several.
    products = [session.run(None, {"x": np.full((n, width), 255, np.uint8)})[0] for n in (1, 4)]
    return any((product != 255 * 127 * width).any() for product in products)
