"""A graph cut into parts gives what the whole gives; 16-bit graphs round each result."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from embedport.artifact.segments import emulate_16_bits, segments
from embedport.exporters.graph.builder import GraphBuilder

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
OPSETS = {"": 23}


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def chain():
    """Three scopes; the last reads a value of the first, and one node has branches."""
    g = GraphBuilder(OPSETS, 10)
    x = ir.val("x", dtype=FLOAT, shape=(None, 4))
    g.scope = "first"
    doubled = g.op("Mul", x, g.constant(2, FLOAT))
    g.scope = "second"
    weight = g.initializer(ir.tensor(np.eye(4, dtype=np.float32)[::-1].copy(), name="weight"))
    turned = g.op("MatMul", doubled, weight)
    g.scope = "third"
    positive = g.op("Greater", g.op("ReduceMax", turned, keepdims=0), g.constant(0, FLOAT))
    positive.dtype = ir.DataType.BOOL
    (out,) = g.choose(
        positive, lambda: [g.op("Add", turned, doubled)], lambda: [g.op("Sub", turned, doubled)]
    )
    out.name, out.shape = "out", ir.Shape((None, 4))
    return g.model([x], [out], "chain")


@pytest.mark.parametrize("sign", [1, -1])
def test_parts_give_what_the_whole_gives(sign):
    x = sign * np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    expected = run(chain(), {"x": x})["out"]
    np.testing.assert_array_equal(expected, 2 * x[:, ::-1] + sign * 2 * x)
    values, scopes = {"x": x}, []
    for scope, part in segments(chain()):
        scopes.append(scope)
        values |= run(
            part, {name: values[name] for name in (str(value.name) for value in part.graph.inputs)}
        )
    assert scopes == ["first", "second", "third"]
    np.testing.assert_array_equal(values["out"], expected)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_each_result_is_rounded_to_16_bits(dtype):
    """x * x overflows or loses digits where it is stored, although a later step divides again."""
    g = GraphBuilder(OPSETS, 10)
    x = ir.val("x", dtype=FLOAT, shape=(None, 2))
    g.scope = "only"
    factor = g.initializer(ir.tensor(np.full(2, 1.001).astype(dtype.numpy()), name="factor"))
    square = g.op("Mul", g.cast(x, dtype), factor)
    square = g.op("Mul", square, square)
    out = g.cast(g.op("Div", square, factor), FLOAT)
    out.name, out.shape = "out", ir.Shape((None, 2))
    model = g.model([x], [out], "halves")
    assert emulate_16_bits(model)
    values = np.array([[300, 0.3]], np.float32)

    def rounded(result):
        with np.errstate(over="ignore"):
            return result.astype(dtype.numpy()).astype(np.float32)

    one = rounded(np.full(2, 1.001, np.float32))
    product = rounded(rounded(values) * one)
    expected = rounded(rounded(product * product) / one)
    assert np.isinf(expected[0, 0]) == (dtype == FLOAT16)
    np.testing.assert_array_equal(run(model, {"x": values})["out"], expected)


def test_a_graph_in_fp32_stays_as_it_is():
    model = chain()
    before = ir.to_proto(model).SerializeToString()
    assert not emulate_16_bits(model)
    assert ir.to_proto(model).SerializeToString() == before
