"""The types that an engine multiplies in, read from what its builder logs of its layers.

A builder with detailed profiling verbosity logs the engine's layers at the end, one a line, in the
words of the engine inspector. The inspector itself needs a GPU, as it takes a deserialized engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

HEADER = "Layers:"
LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName: (?P<rest>.*)"
)
TENSOR = re.compile(
    r"\{ Name: [^{}]*?Dimensions: \[(?P<shape>[^\]]*)\][^{}]*?Datatype: (?P<type>\w+)"
)
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Other kinds compute what surrounds a product.
PRODUCTS = ("gemm", "runtime_fusion")
GENERATED = "a generated kernel"
TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "FP8": "fp8",
    "Int8": "int8",
    "Int4": "int4",
}
CLAIMS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT8: "int8",
}


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Attributes:
        name: Its name.
        kind: "gemm", "kgen" (a generated kernel), "runtime_fusion", …
        inputs: Types of its inputs of two or more dimensions, such as "bf16".
        constants: Types of its constants of two or more dimensions.
        nodes: Names of the ONNX nodes that it computes, in whole or in part.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    nodes: tuple[str, ...]


def read_layers(text: str) -> list[Layer]:
    """The layers of an engine, from the builder's message that starts with `HEADER`.

    Lines of another form, such as copies of shapes, are left out.
    """
    matches = filter(None, map(LINE.fullmatch, text.splitlines()))
    return [
        Layer(
            match["name"],
            match["kind"],
            _types(match["inputs"]),
            _types(match["constants"]),
            tuple(NODE.findall(match["rest"])),
        )
        for match in matches
    ]


def _types(tensors: str) -> tuple[str, ...]:
    return tuple(
        TYPES.get(match["type"], match["type"].lower())
        for match in TENSOR.finditer(tensors)
        if "," in match["shape"]
    )


def computed_products(layers: Iterable[Layer]) -> dict[str, set[str]]:
    """ONNX node to the types that it multiplies in, for the nodes of each product's layer.

    There is a layer for each profile. A product is in 8 bits only if both its inputs are: weights
    in 8 or 4 bits with another input are dequantized before they are multiplied.
    """
    types: dict[str, set[str]] = {}
    for layer in layers:
        if layer.kind in PRODUCTS:
            for node in layer.nodes:
                types.setdefault(node, set()).add(_product_type(layer))
    return types


def _product_type(layer: Layer) -> str:
    for kind in ("int8", "fp8"):
        if (layer.inputs + layer.constants).count(kind) > 1:
            return kind
    # A residual that is added in the same layer is in fp32.
    return next((kind for kind in ("bf16", "fp16") if kind in layer.inputs), "fp32")


def claimed_products(model: ir.Model) -> dict[str, str]:
    """Name of each MatMul to the type that the graph asks for."""
    return {
        str(node.name): _claimed_type(node)
        for node in model.graph.all_nodes()
        if node.op_type == "MatMul"
    }


def _claimed_type(node: ir.Node) -> str:
    sources = [value.producer() for value in node.inputs if value is not None]
    if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
        codes = {source.inputs[0].dtype for source in sources if source and source.inputs[0]}
        if len(codes) == 1 and (kind := CLAIMS.get(codes.pop())) in ("int8", "fp8"):
            return str(kind)
    data = node.inputs[0]
    assert data is not None
    assert data.dtype is not None
    return CLAIMS[data.dtype]


def compare_products(claimed: Mapping[str, str], computed: Mapping[str, set[str]]) -> list[str]:
    """The products that an engine computes in another type than its graph asks for, a line each."""
    return [
        f"{node} should multiply in {kind}, and multiplies in {', '.join(sorted(computed[node]))}"
        for node, kind in claimed.items()
        if computed.get(node, {kind}) != {kind}
    ]


def count_products(claimed: Mapping[str, str], computed: Mapping[str, set[str]]) -> dict[str, int]:
    """Number of products by type, if none is different.

    A small product, such as a reranker's head, may be a part of a generated kernel; which type it
    has there is not logged.
    """
    return dict(Counter(kind if node in computed else GENERATED for node, kind in claimed.items()))
