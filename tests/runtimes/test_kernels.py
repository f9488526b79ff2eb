"""The kernels in C compute what a graph's functions say, and are not missed where they are not."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import embedport
from embedport.attention import SHORT_ROW
from embedport.errors import InputError
from embedport.exporters.graph.dialect import FLOAT, INT8, ScaledTensor
from embedport.exporters.graph.initializers import QuantizedMatrices, QuantizedMatrix
from embedport.exporters.graph.ort_dialect import OrtDialect
from embedport.quantize.schemes import QuantizedTensor, QuantScheme
from embedport.runtimes.ort_custom_ops import VARIABLE, register_kernels
from tests.runtimes.kernels import EPS, SETS, needs_kernels, random, run

DIALECT = OrtDialect()


def both(graph, feeds):
    """A graph's results without kernels, and with them."""
    return [run(graph, feeds, kernels=kernels) for kernels in (False, True)]


def model_of(describe, *widths):
    """A graph as bytes: `describe` gets a builder and an input [batch, size, width] for each."""
    g = DIALECT.builder()
    g.scope = "part"
    inputs = [
        ir.val(f"x{i}", dtype=FLOAT, shape=(None, None, width)) for i, width in enumerate(widths)
    ]
    outputs = describe(g, *inputs)
    model = g.model(inputs, outputs, "part")
    return ir.to_proto(model).SerializeToString()


def rounded(width):
    """A graph that rounds rows."""

    def describe(g, x):
        rows = DIALECT.quantize_rows(g, x, width, INT8)
        return [rows.codes, rows.scales]

    return model_of(describe, width)


def normed(width):
    """A graph that adds, norms and rounds rows."""
    gains = ir.tensor(random(width, seed=1), name="gains")

    def describe(g, residual, x, scales):
        normed, total = DIALECT.add_norm(
            g, residual, ScaledTensor(x, scales), g.initializer(gains), EPS
        )
        rows = normed.rows[INT8]
        return [total, normed.value, rows.codes, rows.scales]

    return model_of(describe, width, width, 1)


def gated(width):
    """A graph that gates and rounds rows."""

    def describe(g, gate, scales, up):
        product = DIALECT.swiglu(g, ScaledTensor(gate, scales), up, width, FLOAT)
        rows = product.rows[INT8]
        return [product.value, rows.codes, rows.scales]

    return model_of(describe, width, 1, width)


def plain(width):
    """A graph that norms rows, adds others and norms the sum."""
    gains = ir.tensor(random(width, seed=1), name="gains")

    def describe(g, x, more):
        weight = g.initializer(gains)
        normed, total = DIALECT.add_norm(g, x, ScaledTensor(more), weight, EPS)
        return [DIALECT.norm(g, x, weight, EPS), normed.value, total]

    return model_of(describe, width, width)


def activated(width):
    """A graph that gates rows."""
    return model_of(
        lambda g, gate, up: [DIALECT.swiglu(g, ScaledTensor(gate), up, width, FLOAT).value],
        width,
        width,
    )


def grouped(scheme, shape, codes=None):
    """A product of random codes and scales, or of the codes given and scales of 1; its matrix."""
    out, columns = shape
    groups = -(-columns // scheme.group_size)
    scales = np.abs(random(out, groups, seed=2)) + 0.1 if codes is None else np.ones((out, groups))
    if codes is None:
        codes = np.random.default_rng(0).integers(0, scheme.levels, shape)
    zero_points = np.full((out, groups), scheme.middle, np.uint8)
    if not scheme.symmetric:
        zero_points = np.random.default_rng(1).integers(0, scheme.levels, (out, groups))
    parts = (codes.astype(np.uint8), scales.astype(np.float32), zero_points.astype(np.uint8))
    tensor = QuantizedTensor(scheme, *parts)
    matrix = QuantizedMatrix("m", shape, scheme, QuantizedMatrices(lambda name: tensor))
    return model_of(lambda g, x: [DIALECT.matmul_groups(g, x, matrix)], columns), tensor


def check(found, expected):
    """Values within rounding; then codes, but where a value is half-way between two, and scales."""
    *values, codes, scales = zip(found, expected, strict=True)
    for each in (*values, scales):
        np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)
    difference = np.abs(codes[0].astype(int) - codes[1])
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 1e-3 * difference.size


# Whole vectors of sixteen, and all but one of its values at the end; more rows than a task has.
@pytest.mark.parametrize("width", [1, 64, 95])
@pytest.mark.usefixtures("instructions")
@needs_kernels
class TestRows:
    def test_rounded(self, width):
        x = random(2, 21, width)
        x[0, 3] = 0
        expected, found = both(rounded(width), {"x0": x})
        check(found, expected)
        assert (found[0][0, 3] == 128).all()

    def test_normed(self, width):
        feeds = {"x0": random(2, 21, width), "x1": random(2, 21, width, seed=2)}
        feeds["x0"][0, 3] = feeds["x1"][0, 3] = 0
        feeds["x2"] = np.abs(random(2, 21, 1, seed=3))
        expected, found = both(normed(width), feeds)
        check(found, expected)

    def test_gated(self, width):
        feeds = {"x0": random(2, 21, width), "x1": np.abs(random(2, 21, 1, seed=3))}
        feeds["x0"][1, 4] = 1e4  # beyond what its exponential reaches, in both directions
        feeds["x0"][1, 5] = -1e4
        feeds["x2"] = random(2, 21, width, seed=2)
        expected, found = both(gated(width), feeds)
        check(found, expected)

    def test_without_codes(self, width):
        feeds = {"x0": random(2, 21, width), "x1": random(2, 21, width, seed=2)}
        for graph in (plain(width), activated(width)):
            expected, found = both(graph, feeds)
            for each in zip(found, expected, strict=True):
                np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)

    def test_nan_is_not_lost(self, width):
        """A damaged weight has to be seen in the result."""
        x, one = random(1, 3, width), np.ones((1, 3, 1), np.float32)
        x[0, 1, 0] = np.nan
        for graph, feeds in (
            (rounded(width), {"x0": x}),
            (normed(width), {"x0": x, "x1": x, "x2": one}),
            (gated(width), {"x0": x, "x1": one, "x2": x}),
        ):
            scales = run(graph, feeds, kernels=True)[-1]
            assert np.isnan(scales).ravel().tolist() == [False, True, False]


# Outputs and inputs that fill the kernel's panels of 32 by 512, and that do not.
@pytest.mark.parametrize("shape", [(48, 1088), (5, 90)], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 32, symmetric=False),
        QuantScheme(4, 64, symmetric=True),
        QuantScheme(4, 128, symmetric=False),
        QuantScheme(8, 128, symmetric=True),
    ],
    ids=str,
)
@needs_kernels
class TestGroups:
    def test_product(self, instructions, scheme, shape):
        """Activations are rounded: a token's error is held to its own size."""
        graph, tensor = grouped(scheme, shape)
        x = random(2, 9, shape[1])
        x[1, 3] = 0
        (found,) = run(graph, {"x0": x}, kernels=True)
        exact = x @ tensor.dequantize().T
        (operator,) = run(graph, {"x0": x}, kernels=False)
        error = np.abs(found - exact).max() / np.abs(exact).max()
        assert error <= 1.1 * np.abs(operator - exact).max() / np.abs(exact).max()
        assert (found[1, 3] == 0).all()

    def test_worst_codes(self, instructions, scheme, shape):
        """Integer products do not saturate: whole numbers come out whole."""
        least = scheme.levels - 255 if scheme.bits == 8 else 0
        codes = np.where(np.arange(shape[1]) % 3, scheme.levels - 1, least)
        graph, tensor = grouped(scheme, shape, np.broadcast_to(codes, shape))
        x = np.where(np.random.default_rng(0).random((1, 4, shape[1])) < 0.5, -127, 127)
        x[0, 0], x[0, 1] = 127, -127
        (found,) = run(graph, {"x0": x.astype(np.float32)}, kernels=True)
        assert np.array_equal(found, (x @ tensor.dequantize().T).astype(np.float32))

    def test_a_token_alone(self, instructions, scheme, shape):
        graph, _ = grouped(scheme, shape)
        x = random(1, 13, shape[1])
        (together,) = run(graph, {"x0": x}, kernels=True)
        alone = [run(graph, {"x0": x[:, i : i + 1]}, kernels=True)[0] for i in range(13)]
        assert np.array_equal(together, np.concatenate(alone, axis=1))

    def test_nan_is_not_lost(self, instructions, scheme, shape):
        graph, _ = grouped(scheme, shape)
        x = random(1, 3, shape[1])
        x[0, 1, -1] = np.nan
        (found,) = run(graph, {"x0": x}, kernels=True)
        assert np.isnan(found).all(axis=2).tolist() == [[False, True, False]]


@needs_kernels
def test_angles(instructions):
    """Cosines and sines of every position that a model has, to float32's last place."""
    frequencies = (1e6 ** -(np.arange(0, 128, 2) / 128)).astype(np.float32)
    angles = (np.arange(0, 40960, 7, dtype=np.float32)[:, None] * frequencies)[None]
    graph = model_of(lambda g, x: list(DIALECT.cos_sin(g, x, FLOAT)), angles.shape[2])
    found = run(graph, {"x0": angles}, kernels=True)
    for each, function in zip(found, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(each, function(angles.astype(np.float64)), atol=6e-8, rtol=0)


@needs_kernels
def test_shapes_that_do_not_go_together_are_refused():
    rows, more, one = random(1, 3, 64), random(1, 4, 64), random(1, 3, 1)
    for graph, feeds in (
        (normed(64), {"x0": rows, "x1": more, "x2": one}),
        (gated(64), {"x0": rows, "x1": one, "x2": more}),
    ):
        with pytest.raises(Exception, match="shapes do not go together"):
            run(graph, feeds, kernels=True)


def more_heads(graph, node):
    """In 64 bits 2^60 heads of 48 are none: the shapes would seem to go together."""
    (heads,) = [each for each in node.attribute if each.name == "num_heads"]
    heads.i += 2**60


def by_heads(graph, node):
    """Queries as [batch, size, heads, head_dim]: the output would have only three of these."""
    shape = onnx.numpy_helper.from_array(np.array([0, 0, 4, 48]), "shape")
    reshape = onnx.helper.make_node("Reshape", [node.input[0], "shape"], ["by_heads"])
    node.input[0] = "by_heads"
    graph.initializer.append(shape)
    graph.node.insert(list(graph.node).index(node), reshape)


@needs_kernels
@pytest.mark.parametrize("change", [more_heads, by_heads])
def test_a_graph_that_would_lead_beyond_the_memory_is_refused(exported, change):
    model = onnx.load(exported("kv2").graph)
    change(
        model.graph, next(node for node in model.graph.node if node.op_type == "RotaryAttention")
    )
    with pytest.raises(Exception, match="RotaryAttention: shapes do not go together"):
        run(model.SerializeToString(), batch(5), kernels=True)


def batch(*lengths, side="right"):
    """Rows of random tokens with padding on one side."""
    size = max(lengths)
    ids = np.random.default_rng(0).integers(0, 500, (len(lengths), size))
    mask = np.arange(size) < np.array(lengths)[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


# Around the 6 and 48 queries, the 64 and 256 keys that go together, and each kind of attention that
# the graph chooses by itself.
LENGTHS = [(1,), (6, 1, 5), (49, 47, 48), (64, 65), (130, 3), (257, 256), (SHORT_ROW + 3, 600)]


@needs_kernels
@pytest.mark.parametrize("geometry", ["kv1", "kv2", "kv8"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(exported, geometry, lengths):
    """Heads of 16 to 48 values, of which 1 to 4 share keys; in fp32 nothing is rounded."""
    graph = exported(geometry).graph
    for side in ("right", "left"):
        expected, found = both(graph, batch(*lengths, side=side))
        np.testing.assert_allclose(found[0], expected[0], atol=3e-6)


@needs_kernels
def test_each_token(exported):
    feeds = batch(70, 20, side="left")
    expected, found = both(exported("kv2", outputs="hidden").graph, feeds)
    real = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-4)


@pytest.mark.skipif(len(SETS) < 2, reason="the CPU has one of the instruction sets")
@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4", "fp32"])
@pytest.mark.parametrize("lengths", LENGTHS[2::2], ids=str)
def test_instruction_sets_give_the_same_bits(exported, monkeypatch, precision, lengths):
    graph = exported("kv8", precision=precision).graph

    def run_with(name):
        monkeypatch.setenv(VARIABLE, name)
        return run(graph, batch(*lengths), kernels=True)[0]

    first, *others = [run_with(name) for name in SETS]
    assert all(np.array_equal(first, other) for other in others)


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_int8(exported, lengths):
    """A value half-way between two codes goes either way, and the next layers make more of it."""
    expected, found = both(exported("kv8", precision="int8").graph, batch(*lengths))
    assert (expected[0] * found[0]).sum(1).min() > 0.9995


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batches_and_pasts_change_no_bit(exported, precision):
    artifact = exported("kv2", "reranker", precision=precision)
    reranker = embedport.load_reranker(artifact.folder, device="cpu")
    documents = ["Leaves.", "sugar " * 40, "", "Chlorophyll takes up light. " * 9, "x" * 41]
    pairs = [("How do plants turn sunlight into sugar?", document) for document in documents]
    rows = reranker.tokenizer.encode(pairs).ids
    alone = [
        run(
            artifact.graph,
            {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])},
            kernels=True,
        )[0][0]
        for ids in map(np.asarray, rows)
    ]
    assert reranker.score(pairs).tolist() == alone


def operators_run(artifact, folder, *, kernels):
    """The operators of the domain embedport that onnxruntime ran, by its own profile."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = True, str(folder / f"{kernels}")
    if kernels:
        register_kernels(options)
    session = onnxruntime.InferenceSession(
        artifact.graph, options, providers=["CPUExecutionProvider"]
    )
    session.run(None, batch(5, 9))
    events = json.loads(Path(session.end_profiling()).read_text())
    run_names = {event["args"]["op_name"] for event in events if event["cat"] == "Node"}
    return run_names & {name for _, name, _ in ir.load(artifact.graph).functions}


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_every_function_is_run_by_its_kernel(exported, tmp_path, precision):
    """Without kernels onnxruntime inlines the functions: comparisons alone would pass then too."""
    artifact = exported("kv8", precision=precision)
    functions = {name for _, name, _ in ir.load(artifact.graph).functions}
    assert "RotaryAttention" in functions
    assert operators_run(artifact, tmp_path, kernels=True) == functions
    assert operators_run(artifact, tmp_path, kernels=False) == set()


# No CPU has both.
MISSING = "neon" if "neon" not in SETS else "avx2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AVX2", "should be one of avx512, avx2, neon, none, found 'AVX2'"),
        (MISSING, f"is {MISSING}, and .*: unset it, or set it to none"),
    ],
)
def test_a_choice_of_kernels_that_is_none_is_refused(exported, monkeypatch, name, message):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(InputError, match=rf"\$EMBEDPORT_KERNELS {message}"):
        embedport.load(exported("kv2").folder, device="cpu")


def test_a_package_without_kernels(exported, monkeypatch, caplog):
    folder = exported("kv2").folder
    texts = ["one text", "and another"]

    def encode() -> Any:
        model: Any = embedport.load(folder, device="cpu")
        return model.encode(texts)

    expected = encode()
    for found, reason in ((None, "without a C compiler"), (folder / "none.so", "cannot be loaded")):
        monkeypatch.setattr(
            "embedport.runtimes.ort_custom_ops.find_library", lambda found=found: found
        )
        with caplog.at_level(logging.INFO, "embedport"):
            vectors = encode()
        assert reason in caplog.text
        np.testing.assert_allclose(vectors, expected, atol=3e-6)
