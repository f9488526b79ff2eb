"""The operators that TensorRT's ONNX parser takes: operators.json, and limits beyond its table.

The table is docs/operators.md of onnx-tensorrt, at the commit in the file. Limits of quantized
types: IQuantizeLayer and IDequantizeLayer in NvInfer.h of TensorRT 11.1, and NVIDIA's
"Quantization Schemes" (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
quantized-types-schemes.html). Other limits are the table's own remarks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

TABLE = Path(__file__).with_name("operators.json")
TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.INT4: "INT4",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.BOOL: "BOOL",
}
# Inputs that must be constants, by operator.
CONSTANT_INPUTS = {
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceSum": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
BLOCKED = ("INT4", "FP8")
INT4_BLOCKS = (64, 128)
# Attention's query, key, value and mask; TensorRT takes no past states.
ATTENTION_INPUTS = 4


@cache
def read_table() -> dict[str, Any]:
    """operators.json."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def unsupported(model: ir.Model) -> list[str]:
    """The reasons why TensorRT's parser would not take a graph, a line each; empty if it should.

    Args:
        model: The graph; each value has a dtype.
    """
    first, last = read_table()["opsets"]
    reasons = [
        f"{domain or 'ai.onnx'} {version}: TensorRT takes ai.onnx {first} to {last}"
        for domain, version in model.opset_imports.items()
        if domain or not first <= version <= last
    ]
    for node in model.graph.all_nodes():
        reasons += [f"{node.name}: {reason}" for reason in _reasons(node)]
    return reasons


def _reasons(node: ir.Node) -> Iterator[str]:
    types = read_table()["operators"].get(node.op_type)
    if node.domain or types is None:
        yield f"{node.domain or 'ai.onnx'}.{node.op_type} is not an operator of TensorRT"
        return
    # The table's dtypes are those of the first input, for every operator.
    data = node.inputs[0]
    type_name = TYPES.get(data.dtype) if data is not None and data.dtype is not None else None
    if type_name not in types:
        dtype = data.dtype.name if data is not None and data.dtype is not None else "nothing"
        yield f"{node.op_type} of {dtype}: TensorRT takes {', '.join(types)}"
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        axes = node.inputs[index]
        if axes is not None and axes.const_value is None:
            yield f"input {index} of {node.op_type} should be a constant"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _quantized_reasons(node, str(type_name))
    if node.op_type == "Attention":
        if any(value is not None for value in node.inputs[ATTENTION_INPUTS:]):
            yield "Attention takes no past keys and values in TensorRT"
        if len(node.outputs) > 1:
            yield "Attention has only one output in TensorRT"


def _quantized_reasons(node: ir.Node, kind: str) -> Iterator[str]:
    data, scales = node.inputs[:2]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and (zero.const_value is None or np.any(zero.const_value.numpy())):
        yield f"the zero point of {node.op_type} should be a constant 0"
    assert data is not None
    assert scales is not None
    if scales.const_value is None:
        yield f"the scales of {node.op_type} should be constants"
        return
    # Activations can have only one scale.
    if scales.const_value.size > 1 and data.const_value is None:
        yield f"{node.op_type} of activations should have one scale"
    block = node.attributes.get_int("block_size", 0)
    if block and kind not in BLOCKED:
        blocked = ", ".join(BLOCKED)
        yield f"{node.op_type} of {kind} has blocks, which TensorRT takes only of {blocked}"
    if block and data.const_value is not None:
        size = data.const_value.shape.numpy()[node.attributes.get_int("axis", 1)]
        if size % block:
            yield f"blocks of {block} do not divide the {size} inputs of {data.name}"
    if kind == "INT4" and block not in INT4_BLOCKS:
        yield f"{node.op_type} of INT4 should have blocks of 64 or 128, found {block or 'none'}"
