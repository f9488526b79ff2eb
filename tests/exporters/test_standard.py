"""The standard dialect without a GPU: TensorRT's parser, strict types, a second engine."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from embedport.exporters.tensorrt.build import parse
from embedport.machine.gpu import make_logger
from embedport.runtimes.batching import pad
from embedport.texts.samples import builtin_samples

TEXTS = [sample.text for sample in builtin_samples()[:8]] + [""]
BF16 = {"arithmetic": "bf16"}
# What a precision is exported with, and its smallest cosine to onnxruntime on a CPU. Rounding to
# 16 bits is another in OpenVINO, which computes in fp32, and fp8 makes more of that than int8;
# onnxruntime multiplies four bits by activations in eight.
VARIANTS = {
    "fp32": ({"precision": "fp32"}, 0.99999),
    "fp16": ({"precision": "fp16"}, 0.9999),
    "bf16": ({"precision": "bf16"}, 0.9999),
    "int8": ({"precision": "int8"}, 0.9999),
    "int8-bf16": ({"precision": "int8", **BF16}, 0.999),
    "int4": ({"precision": "int4"}, 0.9995),
    "int4-bf16": ({"precision": "int4", **BF16}, 0.999),
    "fp8": ({"precision": "fp8"}, 0.998),
}
# OpenVINO is told to compute in fp32, so one graph of 16 bits, fp16, stands for the others.
ON_CPU = [
    pytest.param(each, marks=[pytest.mark.slow] if "bf16" in each else []) for each in VARIANTS
]


@pytest.fixture
def loaded(artifacts):
    """A function (variant's name, task) -> the artifact of the standard dialect, loaded."""
    return lambda name, task="embedding": artifacts(
        "blocks", task, dialect="standard", **VARIANTS[name][0]
    )


# A reranker's graph is an embedder's with other outputs.
BOTH = pytest.mark.parametrize(
    "task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)]
)


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_tensorrt_parses_it(loaded, name, task):
    """Engines of these graphs are built in tests/tensorrt."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(logger := make_logger(trt, lambda message, is_error: None))
    graph = loaded(name, task).artifact.graph
    assert parse(trt, "tensorrt-rtx", builder, logger, graph).num_layers > 100


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_types_are_what_strict_inference_finds(loaded, name, task):
    """The checker reads the file with its external data; inference starts without our types."""
    graph = loaded(name, task).artifact.graph
    onnx.checker.check_model(graph, full_check=True)
    model = onnx.load(graph, load_external_data=False)
    nodes = ir.load(graph).graph
    declared = {value.name: value.dtype for node in nodes for value in node.outputs}
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    assert {name: ir.DataType(kind) for name, kind in found.items()} == declared


@pytest.mark.parametrize("name", ON_CPU)
def test_in_openvino(loaded, name):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    embedder = loaded(name)
    ids, mask = pad(embedder.tokenizer.encode(TEXTS).ids)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(embedder.artifact.graph), "CPU", options)
    found, expected = compiled([ids, mask])[0], embedder.model(ids, mask)
    assert (found * expected).sum(axis=1).min() >= VARIANTS[name][1]


# To transformers: the demo's matrices are random and small, on which four bits cost most.
LIMITS = {"int8-bf16": 0.999, "int4-bf16": 0.9, "fp8": 0.995}


@pytest.mark.parametrize("name", LIMITS)
def test_quantized_in_16_bits(loaded, reference, name):
    embedder = loaded(name)
    assert embedder.artifact.manifest.graph.arithmetic == "bf16"
    assert "each result rounded" in embedder.model.precision
    expected = reference("blocks", "embedding")
    vectors = embedder.encode([sample.text for sample in builtin_samples()] + [""])
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= LIMITS[name]


def test_weights_are_float8(loaded):
    graph = ir.load(loaded("fp8").artifact.graph).graph
    kinds = [value.dtype for value in graph.initializers.values()]
    assert kinds.count(ir.DataType.FLOAT8E4M3FN) == 2 * 7 + 1  # a layer's matrices, the zero point


def test_weights_in_groups_for_onnxruntime_on_a_gpu(artifacts):
    """MatMulNBits takes bf16 activations and scales there; on a CPU each result is rounded."""
    fp32 = artifacts("blocks", precision="int8-weight")
    bf16 = artifacts("blocks", precision="int8-weight", arithmetic="bf16")
    cosines = (fp32.encode(TEXTS) * bf16.encode(TEXTS)).sum(axis=1)
    assert 0.999 < cosines.min() < 0.9999999
