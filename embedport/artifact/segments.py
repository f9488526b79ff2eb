"""Runs a written graph part by part, with one layer's weights in memory at a time.

The exporter names nodes "{scope}/{operator}_{n}"; consecutive nodes of one scope are a segment.
`emulate_16_bits` makes a CPU round like a GPU when it runs a 16-bit graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import onnx_ir as ir

# The exporter's names: the scope that looks up the table's rows, and the matrix that undoes a
# rotation.
EMBEDDING = "embed_tokens"
ROTATION = "output.rotation"
FLOAT = ir.DataType.FLOAT
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def segments(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """Split a model into one model per scope.

    Yields:
        (scope, model), to be run in order: the inputs are outputs of earlier ones and inputs of
        the whole model, by name, and the last has the whole model's outputs. Weights are not
        copied.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    parts = [
        (scope, list(nodes))
        for scope, nodes in groupby(list(graph), key=lambda node: str(node.name).split("/")[0])
    ]
    full = [[inner for node in nodes for inner in _with_branches(node)] for _, nodes in parts]
    part_of = {node: i for i, nodes in enumerate(full) for node in nodes}
    for i, (scope, nodes) in enumerate(parts):
        produced = [value for node in nodes for value in node.outputs]
        internal = {value for node in full[i] for value in node.outputs}
        inputs = dict.fromkeys(
            value
            for node in full[i]
            for value in node.inputs
            if value is not None and value not in internal and not value.is_initializer()
        )
        exposed = [
            value
            for value in produced
            if value in outputs or any(part_of[node] != i for node, _ in value.uses())
        ]
        part = ir.convenience.extract(graph, list(inputs), exposed)
        functions = _called(full[i], model)
        yield scope, ir.Model(part, ir_version=model.ir_version, functions=functions)


def _called(nodes: Iterable[ir.Node], model: ir.Model) -> list[ir.Function]:
    """The functions that nodes call, and those that these call: all others cost each part time."""
    called: dict[ir.OperatorIdentifier, ir.Function] = {}
    waiting = list(nodes)
    while waiting:
        name = waiting.pop().op_identifier()
        if name in model.functions and name not in called:
            called[name] = model.functions[name]
            waiting += called[name].all_nodes()
    return list(called.values())


def _with_branches(node: ir.Node) -> Iterator[ir.Node]:
    """A node and, recursively, the nodes in its subgraphs (branches)."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _with_branches(inner)


def emulate_16_bits(model: ir.Model) -> bool:
    """Make an fp16 or bf16 graph compute in fp32 and round each result to 16 bits, in place.

    On a CPU, onnxruntime has no bf16 kernels, and it runs fp16 in fp32 without most of the
    rounding, so values that overflow on a GPU do not overflow there. Rounding after each operation
    matches a GPU, which accumulates in fp32 and stores 16 bits. Weights stay 16-bit in their file.

    Returns:
        Whether the graph had 16-bit values or weights.
    """
    graph = model.graph
    values = [value for node in graph for value in node.outputs if value.dtype in HALVES]
    weights = [value for value in graph.initializers.values() if value.dtype in HALVES]
    for value in values:
        node, dtype = value.producer(), value.dtype
        assert node is not None
        assert dtype is not None
        if node.op_type == "Cast" or (node.op_type == "Gather" and node.inputs[0] in weights):
            rounded = value
        else:
            value.dtype = FLOAT
            rounded = _cast(value, dtype)
        _cast(rounded, FLOAT)
    for weight in weights:
        for node, index in list(weight.uses()):
            # Gather first and widen its output: a table of 150,000 rows stays 16-bit.
            if node.op_type == "Gather" and index == 0:
                continue
            name = f"{node.name}/{weight.name}"
            wide = ir.Value(name=f"{name}:fp32", type=ir.TensorType(FLOAT))
            cast = ir.node("Cast", [weight], {"to": FLOAT}, outputs=[wide], name=name)
            graph.insert_before(node, cast)
            node.replace_input_with(index, wide)
    return bool(values or weights)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Insert a cast after a value, and make the value's users read the cast's output."""
    node = value.producer()
    assert node is not None
    assert node.graph is not None
    users = list(value.uses())
    out = ir.Value(name=f"{value.name}:{dtype.name.lower()}", type=ir.TensorType(dtype))
    # The value's name begins with its node's name, and so with the scope.
    name = f"{value.name}/{dtype.name}"
    cast = ir.node("Cast", [value], {"to": dtype}, outputs=[out], name=name)
    node.graph.insert_after(node, cast)
    for user, index in users:
        user.replace_input_with(index, out)
    return out
