"""A written graph, run part by part: one layer's weights in memory at a time, whatever its size.

Nodes are named "{scope}/{operator}_{n}" by the exporter; a run of nodes of one scope is a segment.
Also here: how a CPU, which has no 16-bit arithmetic to speak of, runs a 16-bit graph faithfully.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def segments(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """Cut a model into its scopes.

    Yields:
        (scope, model): run in order, each takes outputs of earlier ones and the model's inputs by
        their names, and the last gives the model's outputs. Weights stay where they are.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    parts = [
        (scope, list(nodes))
        for scope, nodes in groupby(list(graph), key=lambda node: str(node.name).split("/")[0])
    ]
    whole = [[inner for node in nodes for inner in _with_branches(node)] for _, nodes in parts]
    part_of = {node: i for i, nodes in enumerate(whole) for node in nodes}
    for i, (scope, nodes) in enumerate(parts):
        produced = [value for node in nodes for value in node.outputs]
        inside = {value for node in whole[i] for value in node.outputs}
        taken = dict.fromkeys(
            value
            for node in whole[i]
            for value in node.inputs
            if value is not None and value not in inside and not value.is_initializer()
        )
        given = [
            value
            for value in produced
            if value in outputs or any(part_of[node] != i for node, _ in value.uses())
        ]
        part = ir.convenience.extract(graph, list(taken), given)
        functions = list(model.functions.values())
        yield scope, ir.Model(part, ir_version=model.ir_version, functions=functions)


def _with_branches(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those in its branches."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _with_branches(inner)


def emulate_16_bits(model: ir.Model) -> bool:
    """Make an fp16 or bf16 graph one that computes in fp32 and rounds each result to 16 bits.

    onnxruntime has no bf16 kernels on a CPU. It runs fp16 in fp32 there and leaves out most of the
    rounding, so that what overflows on a GPU does not overflow. Rounding after each operation gives
    what a GPU gives, which accumulates in fp32 and stores 16 bits. Weights stay 16 bits in their
    file.

    Returns:
        Whether there was anything to emulate.
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
            # Rows are gathered first and widened then: a table of 150,000 rows stays 16 bits.
            if node.op_type == "Gather" and index == 0:
                continue
            name = f"{node.name}/{weight.name}"
            wide = ir.Value(name=f"{name}:fp32", type=ir.TensorType(FLOAT))
            cast = ir.node("Cast", [weight], {"to": FLOAT}, outputs=[wide], name=name)
            graph.insert_before(node, cast)
            node.replace_input_with(index, wide)
    return bool(values or weights)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Insert a cast behind a value, and give it all the value's uses."""
    node = value.producer()
    assert node is not None
    assert node.graph is not None
    users = list(value.uses())
    out = ir.Value(name=f"{value.name}:{dtype.name.lower()}", type=ir.TensorType(dtype))
    # The value's name begins with its node's, and so with the scope.
    name = f"{value.name}/{dtype.name}"
    cast = ir.node("Cast", [value], {"to": dtype}, outputs=[out], name=name)
    node.graph.insert_after(node, cast)
    for user, index in users:
        user.replace_input_with(index, out)
    return out
