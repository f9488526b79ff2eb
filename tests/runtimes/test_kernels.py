"""The kernels in C compute what a graph's functions say, and are not missed where they are not."""

import logging
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import embedport
from embedport.attention import SHORT_ROW
from embedport.exporters.onnx.builder import GraphBuilder
from embedport.exporters.onnx.dialect import FLOAT, INT8, Product
from embedport.exporters.onnx.ort_dialect import OrtDialect
from embedport.runtimes.compiled import register_kernels

DIALECT = OrtDialect()
EPS = 1e-6


needs_kernels = pytest.mark.skipif(
    not register_kernels(onnxruntime.SessionOptions()),
    reason="there was no C compiler, or the CPU has no AVX-512",
)


def run(graph, feeds, *, kernels):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if kernels:
        register_kernels(options)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def both(graph, feeds):
    """What a graph gives without kernels, and with them."""
    return [run(graph, feeds, kernels=kernels) for kernels in (False, True)]


def model_of(describe, *widths):
    """A graph as bytes: `describe` gets a builder and an input [batch, size, width] for each."""
    g = GraphBuilder()
    g.scope = "part"
    inputs = [
        ir.val(f"x{i}", dtype=FLOAT, shape=(None, None, width)) for i, width in enumerate(widths)
    ]
    outputs = describe(g, *inputs)
    model = g.model(inputs, outputs, opsets=DIALECT.opsets, ir_version=11, name="part")
    return ir.to_proto(model).SerializeToString()


def rounded(width):
    """A graph that rounds rows."""

    def describe(g, x):
        rows = DIALECT.quantize_rows(g, x, width, INT8)
        return [rows.codes, rows.scales]

    return model_of(describe, width)


def fused(g, value):
    """The codes and scales that the function before has given for its value."""
    rows = g.once((value, INT8), lambda: pytest.fail("there are no codes"))
    return [rows.codes, rows.scales]


def normed(width):
    """A graph that adds, norms and rounds rows."""
    gains = ir.tensor(random(width, seed=1), name="gains")

    def describe(g, residual, x, scales):
        normed, total = DIALECT.add_norm(g, residual, Product(x, scales), g.initializer(gains), EPS)
        return [total, normed, *fused(g, normed)]

    return model_of(describe, width, width, 1)


def gated(width):
    """A graph that gates and rounds rows."""

    def describe(g, gate, scales, up):
        product = DIALECT.swiglu(g, Product(gate, scales), up, width, FLOAT)
        return [product, *fused(g, product)]

    return model_of(describe, width, 1, width)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * 3


def check(found, expected):
    """Values within rounding; then codes, but where a value is half-way between two, and scales."""
    *values, codes, scales = zip(found, expected, strict=True)
    for each in (*values, scales):
        np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)
    difference = np.abs(codes[0].astype(int) - codes[1])
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 1e-3 * difference.size


# Whole vectors of sixteen, and a part of one at the end; more rows than a task has.
@pytest.mark.parametrize("width", [1, 64, 88])
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


@needs_kernels
def test_shapes_that_do_not_go_together_are_refused():
    rows, more, one = random(1, 3, 64), random(1, 4, 64), random(1, 3, 1)
    for graph, feeds in (
        (normed(64), {"x0": rows, "x1": more, "x2": one}),
        (gated(64), {"x0": rows, "x1": one, "x2": more}),
    ):
        with pytest.raises(Exception, match="shapes do not go together"):
            run(graph, feeds, kernels=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoints):
    """A function (geometry, task, **options of export) -> artifact, cached."""
    made = {}

    def make(geometry, task="embedding", **options):
        key = (geometry, task, *options.items())
        if key not in made:
            output = tmp_path_factory.mktemp("kernels") / "model"
            made[key] = embedport.export(checkpoints(geometry, task), output, **options)
        return made[key]

    return make


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
    reranker = embedport.load(artifact.folder, device="cpu")
    assert isinstance(reranker, embedport.Reranker)
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


def test_a_package_without_kernels(exported, monkeypatch, caplog):
    folder = exported("kv2").folder
    texts = ["one text", "and another"]

    def encode() -> Any:
        model: Any = embedport.load(folder, device="cpu")
        return model.encode(texts)

    expected = encode()
    for found, reason in ((None, "built without kernels"), (folder / "none.so", "do not run here")):
        monkeypatch.setattr("embedport.runtimes.compiled.find_library", lambda found=found: found)
        with caplog.at_level(logging.INFO, "embedport"):
            vectors = encode()
        assert reason in caplog.text
        np.testing.assert_allclose(vectors, expected, atol=3e-6)
