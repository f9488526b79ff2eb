"""The prefix that a reranker's rows share is computed once, and changes no score."""

import itertools
import json
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest

import embedport
from embedport.attention import SHORT_ROW
from embedport.errors import ArtifactError
from embedport.runtimes.batching import pad
from embedport.runtimes.ort_custom_ops import choose_kernels, register_kernels
from embedport.runtimes.prefix_cache import SHARED_TOKENS, group_rows, shared_length
from embedport.texts.samples import builtin_pairs

PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]
QUERY = "How do plants turn sunlight into sugar?"
RAGGED = ["", "Leaves.", "sugar " * 40, "Chlorophyll takes up light.", "x" * 41, "Leaves."]
# In the test tokenizer, whose tokens are short.
LONG = ["sugar " * 400, "light " * 500]
# Of a probability, as float32 sums in another order.
MOST_APART = 1e-5
# onnxruntime's operators sum in another order behind a prefix, and int8 rounds what differs.
OPERATORS_APART = 1e-3


def load(folder, **options) -> Any:
    return embedport.load(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def rerankers(exported):
    """A function (geometry, precision) -> reranker on the CPU, cached."""

    @cache
    def make(geometry="kv2", precision="fp32"):
        return load(exported(geometry, "reranker", precision=precision).folder)

    return make


def plain_scores(reranker, pairs, **options):
    """The main graph's, as other software runs it: each row alone and whole."""
    session_options = onnxruntime.SessionOptions()
    register_kernels(session_options)
    session = onnxruntime.InferenceSession(reranker.artifact.graph, session_options)
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask"]
    rows = [pad([ids]) for ids in reranker.tokenizer.encode(pairs, **options).ids]
    return np.concatenate(
        [session.run(None, {"input_ids": ids, "attention_mask": mask})[0] for ids, mask in rows]
    )


@pytest.mark.parametrize(
    ("geometry", "precision"),
    [
        ("kv1", "fp32"),
        ("kv8", "fp32"),
        ("kv2", "int8"),
        ("kv2", "int4"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("kv2", "fp32"),
                ("kv2", "int8-weight"),
                *itertools.product(["kv1", "kv8"], ["int8", "int8-weight", "int4"]),
            ]
        ),
    ],
)
def test_scores_are_those_of_the_plain_path(rerankers, geometry, precision):
    reranker = rerankers(geometry, precision)
    assert reranker.model.continues
    pairs = [
        *PAIRS[::3],
        *((QUERY, document) for document in RAGGED + LONG),
        ("alone", "a pair of its own"),
    ]
    expected = plain_scores(reranker, pairs)
    for batch_tokens in (4096, 300):
        scores = reranker.score(pairs, batch_tokens=batch_tokens)
        np.testing.assert_allclose(scores, expected, atol=MOST_APART, rtol=0)
    assert np.ptp(expected) > 100 * MOST_APART


@pytest.mark.parametrize("documents", [[], [""], ["one document"], ["same", "same"], RAGGED])
def test_rank(rerankers, documents):
    reranker = rerankers(precision="int8")
    ranking = reranker.rank(QUERY, documents, instruction="Find the reason")
    found = {each.index: each.score for each in ranking}
    assert sorted(found) == list(range(len(documents)))
    if documents:
        pairs = [(QUERY, document) for document in documents]
        expected = plain_scores(reranker, pairs, instruction="Find the reason")
        scores = [found[i] for i in range(len(documents))]
        limit = OPERATORS_APART if choose_kernels()[0] is None else MOST_APART
        np.testing.assert_allclose(scores, expected, atol=limit, rtol=0)


def test_what_is_shared_runs_once(rerankers, monkeypatch):
    reranker = rerankers()
    runs = []
    run = reranker.model._session.run

    class Counted:
        def run(self, outputs, feeds):
            runs.append((feeds["past"].shape[2], *feeds["input_ids"].shape))
            return run(outputs, feeds)

    monkeypatch.setattr(reranker.model, "_session", Counted())
    reranker.rank(QUERY, RAGGED, batch_tokens=400)
    (none, one, shared), *batches = runs
    assert (none, one) == (0, 1)
    assert len(reranker.tokenizer.prefix) < shared
    assert len(batches) > 1
    assert all(past == shared for past, _, _ in batches)
    assert sum(rows for _, rows, _ in batches) == len(RAGGED)
    assert all(rows * (past + size) <= 400 or rows == 1 for past, rows, size in batches)


def test_long_rows_share_among_themselves(rerankers, monkeypatch):
    """The prefix was computed in the same way as the rows."""
    reranker = rerankers()
    read, reads = reranker.model.read, []

    def watched(ids, *, short):
        reads.append((len(ids), short))
        return read(ids, short=short)

    monkeypatch.setattr(reranker.model, "read", watched)
    reranker.rank(QUERY, RAGGED + LONG)
    rows = reranker.tokenizer.encode([(QUERY, document) for document in LONG]).ids
    assert min(map(len, rows)) > SHORT_ROW
    assert [short for _, short in reads] == [True, False]


def test_cut_rows(rerankers):
    """Longest first: a long query leaves its documents no room, and all rows are alike."""
    artifact = rerankers().artifact
    reranker = load(artifact.folder, max_length=120)
    for query in (QUERY, "word " * 300):
        pairs = [(query, document) for document in ("a b c", "sugar " * 200, "light " * 200)]
        assert max(map(len, reranker.tokenizer.encode(pairs).ids)) == 120
        np.testing.assert_allclose(
            reranker.score(pairs), plain_scores(reranker, pairs), atol=MOST_APART, rtol=0
        )


def test_a_long_query_is_shared_up_to_a_limit(rerankers):
    reranker = rerankers()
    pairs = [("word " * 2 * SHARED_TOKENS, document) for document in ("a", "b c")]
    rows = reranker.tokenizer.encode(pairs).ids
    assert shared_length(rows) == SHARED_TOKENS
    np.testing.assert_allclose(
        reranker.score(pairs), plain_scores(reranker, pairs), atol=MOST_APART, rtol=0
    )


def test_artifacts_without_a_continuation(rerankers, copied):
    reranker = rerankers()
    folder = copied(reranker.artifact.folder)
    manifest = reranker.artifact.manifest
    (folder / manifest.graph.continuation.path).unlink()
    values = json.loads(manifest.to_json())
    del values["graph"]["continuation"], values["files"][manifest.graph.continuation.path]
    (folder / "embedport.json").write_text(json.dumps(values))
    plain = load(folder)
    assert not plain.model.continues
    np.testing.assert_allclose(plain.score(PAIRS), reranker.score(PAIRS), atol=1e-6, rtol=0)


def test_an_onnxruntime_too_old_for_it(rerankers, checkpoints, tmp_path, monkeypatch):
    folder = rerankers().artifact.folder
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    plain = load(folder)
    assert not plain.model.continues
    np.testing.assert_allclose(plain.score(PAIRS), rerankers().score(PAIRS), atol=1e-6, rtol=0)
    embedport.export(checkpoints("kv2", "reranker"), tmp_path / "out")
    assert not (tmp_path / "out" / "onnx" / "continuation.onnx").exists()


def test_an_onnxruntime_too_old_for_the_graph(rerankers, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.27.0")
    with pytest.raises(ArtifactError, match=r"needs onnxruntime>=1\.28, found 1\.27\.0"):
        load(rerankers().artifact.folder)


def test_who_gets_a_continuation(checkpoints, tmp_path, rerankers):
    embedport.export(checkpoints("kv2"), tmp_path / "embedder")
    reranker = checkpoints("kv2", "reranker")
    embedport.export(reranker, tmp_path / "standard", dialect="standard")
    embedport.export(reranker, tmp_path / "16", precision="bf16")
    assert not list(tmp_path.rglob("continuation.onnx"))
    artifact = rerankers().artifact
    graph = artifact.manifest.graph
    assert graph.continuation.requires == "onnxruntime>=1.32"
    assert graph.inputs == ("input_ids", "attention_mask")
    # The weights are those of the main graph.
    assert (artifact.folder / graph.continuation.path).stat().st_size < 100_000


def test_groups():
    assert group_rows(["a", "b", "a", "c"], [9] * 4) == [[0, 2], [1, 3]]
    assert group_rows(["a", "b"], [9, 9]) == [[0, 1]]
    assert group_rows(["a"] * 4, [9, SHORT_ROW + 9, SHORT_ROW, SHORT_ROW + 1]) == [[0, 2], [1, 3]]
    assert group_rows([], []) == []
    rows = [np.array(row) for row in ([1, 2, 3], [1, 2, 3, 4], [1, 2])]
    assert shared_length(rows) == 1
    assert shared_length(rows[:2]) == 2
    assert shared_length(rows[:1]) == 0
    assert shared_length([np.array([1, 2]), np.array([3, 2])]) == 0
