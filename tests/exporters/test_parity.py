"""The graph against transformers, on real text in ragged batches."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from embedport.attention import SHORT_ROW
from embedport.exporters.graph.ort_dialect import SMALL_ROW
from embedport.texts.samples import builtin_pairs, builtin_samples

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]

GEOMETRIES = ("kv1", "kv2", "kv8")
DIALECTS = ("ort", "standard")
# Minimum cosine, largest difference of score.
LIMITS = {"fp32": (0.99999, 1e-6), "fp16": (0.9995, 1e-3), "bf16": (0.9995, 5e-3)}


def cases(fast):
    """Each geometry, dialect and precision; all that `fast` does not choose are slow."""
    return [
        pytest.param(*case, marks=[] if fast(*case) else [pytest.mark.slow])
        for case in itertools.product(GEOMETRIES, DIALECTS, LIMITS)
    ]


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(
    ("geometry", "dialect", "precision"),
    cases(
        lambda geometry, *kind: (
            (kind == ("ort", "fp32") and geometry != "kv2")
            or (geometry == "kv8" and kind in (("ort", "fp16"), ("standard", "bf16")))
        )
    ),
)
def test_embedding(artifacts, reference, geometry, dialect, precision):
    embedder = artifacts(geometry, "embedding", dialect=dialect, precision=precision)
    vectors = embedder.encode(TEXTS, batch_tokens=2048)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert cosines(vectors, reference(geometry, "embedding")).min() >= LIMITS[precision][0]


@pytest.mark.parametrize(
    ("geometry", "dialect", "precision"),
    cases(
        lambda geometry, dialect, precision: (
            precision == "fp32" and (dialect, geometry) in (("ort", "kv1"), ("standard", "kv8"))
        )
    ),
)
def test_reranker(artifacts, reference, geometry, dialect, precision):
    """One row of the head gives the softmax of two tokens, in fp32 to the last digits."""
    reranker = artifacts(geometry, "reranker", dialect=dialect, precision=precision)
    scores = reranker.score(PAIRS, batch_tokens=2048)
    assert scores.dtype == np.float32
    assert scores.shape == (len(PAIRS),)
    difference = np.abs(scores - reference(geometry, "reranker"))
    assert difference.max() <= LIMITS[precision][1]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bf16_has_finer_cosines(artifacts, dialect):
    """Its own would add as much to the error of a score as all else."""
    graph = ir.load(artifacts("kv2", dialect=dialect, precision="bf16").artifact.graph).graph
    rotations = [node for node in graph if node.op_type == "RotaryEmbedding"]
    layers = sum(node.op_type in ("Attention", "GroupQueryAttention") for node in graph)
    assert len(rotations) == 2 * layers > 0
    for node in rotations:
        made_by = {value.producer() for value in node.inputs if value is not None}
        casts = {each for each in made_by if each is not None and each.op_type == "Cast"}
        assert {each.attributes["to"].as_int() for each in casts} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_where_attention_changes_its_kernel(artifacts, checkpoints, reference_vectors, geometry):
    embedder = artifacts(geometry)
    random = np.random.default_rng(0)
    sizes = [limit + i for limit in (SMALL_ROW, SHORT_ROW) for i in (0, 1, 2, 3)]
    rows = [random.integers(0, embedder.info.vocab_size, size) for size in (1, *sizes)]
    expected = reference_vectors(checkpoints(geometry), rows)
    alone = np.concatenate([embedder.embed_rows([ids]) for ids in rows])
    assert cosines(alone, expected).min() >= LIMITS["fp32"][0]
    together = embedder.embed_rows(rows, batch_tokens=16_384)
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dialect", ["ort", pytest.param("standard", marks=pytest.mark.slow)])
def test_a_text_alone_and_in_a_ragged_batch(artifacts, dialect):
    embedder = artifacts("kv2", dialect=dialect)
    together = embedder.encode(TEXTS, batch_tokens=16_384)
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert cosines(together, alone).min() >= 0.999999


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("outputs", ["pooled", "hidden"])
def test_any_padding_side(artifacts, dialect, outputs):
    """Left, right, both and extra padding, whatever ids the padding has."""
    embedder = artifacts("kv8", dialect=dialect, outputs=outputs)
    rows = embedder.tokenizer.encode(TEXTS[:7]).ids
    size = max(map(len, rows)) + 5
    generator = np.random.default_rng(0)
    expected = np.concatenate([embedder.model(ids[None], np.ones_like(ids[None])) for ids in rows])
    for start_of in (
        lambda n: 0,
        lambda n: size - n,
        lambda n: (size - n) // 2,
        lambda n: int(generator.integers(size - n + 1)),
    ):
        input_ids = generator.integers(0, 1000, (len(rows), size))
        mask = np.zeros_like(input_ids)
        for i, ids in enumerate(rows):
            start = start_of(len(ids))
            input_ids[i, start : start + len(ids)] = ids
            mask[i, start : start + len(ids)] = 1
        assert cosines(embedder.model(input_ids, mask), expected).min() >= 0.999999


@pytest.mark.parametrize("dialect", DIALECTS)
def test_hidden_states_stay_where_the_tokens_are(artifacts, reference_states, dialect):
    """`last_hidden_state` is after the final norm, at the caller's positions under left padding."""
    import onnxruntime

    embedder = artifacts("kv1", dialect=dialect, outputs="hidden")
    session = onnxruntime.InferenceSession(
        embedder.artifact.graph, providers=["CPUExecutionProvider"]
    )
    rows = embedder.tokenizer.encode(TEXTS[:5]).ids
    size = max(map(len, rows)) + 2
    input_ids = np.zeros((len(rows), size), np.int64)
    mask = np.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        input_ids[i, size - len(ids) :] = ids
        mask[i, size - len(ids) :] = 1
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    hidden = np.asarray(session.run(["last_hidden_state"], feeds)[0])
    for i, expected in enumerate(reference_states("kv1", rows)):
        np.testing.assert_allclose(hidden[i, size - len(expected) :], expected, atol=2e-4, rtol=0)


def test_matryoshka_dimension_in_the_graph_and_at_run_time(artifacts):
    whole, cut = artifacts("kv2"), artifacts("kv2", dim=16)
    assert cut.dim == 16
    np.testing.assert_allclose(
        cut.encode(TEXTS[:9]), whole.encode(TEXTS[:9], dim=16), atol=1e-6, rtol=0
    )
    prefix = whole.encode(TEXTS[:9])[:, :16]
    prefix /= np.linalg.norm(prefix, axis=1, keepdims=True)
    np.testing.assert_allclose(whole.encode(TEXTS[:9], dim=16), prefix, atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_contract_of_the_graph(artifacts, task, dialect):
    """Two inputs, named outputs, dynamic batch and length, no past, no position ids."""
    import onnxruntime

    artifact = artifacts("kv2", task, dialect=dialect).artifact
    session = onnxruntime.InferenceSession(artifact.graph, providers=["CPUExecutionProvider"])
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs == {
        name: ("tensor(int64)", ["batch", "sequence"]) for name in ("input_ids", "attention_mask")
    }
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    expected = {"sentence_embedding": ["batch", 64]}
    if task == "reranker":
        expected = {"score": ["batch"], "logits": ["batch", 1]}
        if dialect == "standard":  # engines have one output
            del expected["logits"]
    assert outputs == {name: ("tensor(float)", shape) for name, shape in expected.items()}
