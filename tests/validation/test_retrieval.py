"""Retrieval measured: reading a set, measures by hand, and what a damaged artifact shows."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from math import log2

import numpy as np
import pytest

import embedport
from embedport.errors import InputError
from embedport.runtimes.vectors import mrl_dims
from embedport.texts import ranking
from embedport.texts.beir import RetrievalSet, read_beir, write_candidates
from embedport.texts.ranking import candidate_pairs, measure, rank_documents, search
from embedport.validation.library import LibraryReference
from embedport.validation.retrieval import (
    RetrievalReport,
    bootstrap,
    compare_quality,
    interval,
    score_quality,
    vector_quality,
)
from embedport.validation.tasks import EmbeddingTask

DOCUMENTS = {
    "china": "The capital of China is Beijing.",
    "gravity": "Gravity is a force that attracts two bodies towards each other.",
    "kettle": "To descale a kettle, boil vinegar and water in it.",
    "river": "The Amazon is the longest river of South America.",
    "iron": "Tiredness and pale skin are signs of iron deficiency.",
}
QUERIES = {"q1": "capital of China", "q2": "what is gravity", "q3": "how to descale a kettle"}
QRELS = [("q1", "china", 1), ("q2", "gravity", 2), ("q2", "river", 0), ("q3", "kettle", 1)]


def write_set(folder, *, candidates=True, compress=False):
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        text = "".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in texts.items())
        if compress:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    lines = ["query-id\tcorpus-id\tscore"] + ["\t".join(map(str, row)) for row in QRELS]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    if candidates:
        write_candidates(folder / "candidates.tsv", {q: list(DOCUMENTS) for q in QUERIES})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "small")


@pytest.mark.parametrize("compress", [False, True])
def test_a_set_is_read(tmp_path, compress):
    data = read_beir(write_set(tmp_path / "small", compress=compress))
    assert data == RetrievalSet(
        "small",
        QUERIES,
        DOCUMENTS,
        {"q1": {"china": 1}, "q2": {"gravity": 2, "river": 0}, "q3": {"kettle": 1}},
        {query: list(DOCUMENTS) for query in QUERIES},
    )


def test_titles_are_joined(folder):
    (folder / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": k, "title": "T", "text": v}) + "\n" for k, v in DOCUMENTS.items()
        )
    )
    assert read_beir(folder).documents["china"] == f"T {DOCUMENTS['china']}"


def test_the_same_queries_are_taken_each_time(folder):
    few = [read_beir(folder, max_queries=2) for _ in range(2)]
    assert few[0] == few[1]
    assert len(few[0].queries) == len(few[0].relevance) == len(few[0].candidates) == 2
    with pytest.raises(InputError, match="max_queries should be at least 1, found 0"):
        read_beir(folder, max_queries=0)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("corpus.jsonl", None, "has no corpus.jsonl: a retrieval set is"),
        ("corpus.jsonl", "\n", "holds no text"),
        ("corpus.jsonl", "{}\n", "corpus.jsonl:1 should be an object"),
        ("corpus.jsonl", '{"_id": "a", "text": 7}\n', "corpus.jsonl:1: text should be a string"),
        ("queries.jsonl", '{"_id": "a", "text": "b"}\n' * 2, "queries.jsonl:2: _id should be"),
        ("qrels/test.tsv", None, "test.tsv cannot be read"),
        ("qrels/test.tsv", "q1\tchina\t1\n", "test.tsv:1 should be a header"),
        ("qrels/test.tsv", "h\nq1\tchina\n", "test.tsv:2 should be query-id"),
        ("qrels/test.tsv", "h\nq1\tchina\t0.5\n", "test.tsv:2 should be query-id"),
        ("qrels/test.tsv", "h\nq1\tchina\t--1\n", "test.tsv:2 should be query-id"),
        ("qrels/test.tsv", "h\nq1\tchina\t-1\n", "relevance should be 0 or more"),
        ("qrels/test.tsv", "h\nq9\tchina\t1\n", "test.tsv:2: no query has the id 'q9'"),
        ("qrels/test.tsv", "h\nq1\tx\t1\n", "test.tsv:2: no document has the id 'x'"),
        ("qrels/test.tsv", "h\nq1\tchina\t0\n", "no query has a relevant document"),
        ("candidates.tsv", "h\nq1\tx\t1\n", "candidates.tsv:2: no document has the id 'x'"),
    ],
)
def test_bad_files_are_named(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_beir(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_beir(tmp_path / "nothing")


def test_measures_by_hand():
    relevance = {"a": {"x": 1, "y": 1}, "b": {"z": 1}}
    ranking = {"a": ["u", "x", "v", "y"], "b": ["u", "v"]}
    found = measure(ranking, relevance, ("nDCG@10", "R@100", "RR"))
    ideal = 1 + 1 / log2(3)
    np.testing.assert_allclose(found["nDCG@10"], [(1 / log2(3) + 1 / log2(5)) / ideal, 0])
    np.testing.assert_allclose(found["R@100"], [1, 0])
    np.testing.assert_allclose(found["RR"], [1 / 2, 0])


def test_search_finds_the_nearest_and_keeps_the_order_of_equal_ones():
    documents = np.eye(4, dtype=np.float32)[[0, 1, 1, 2]]
    queries = np.array([[0, 1, 0, 0], [0, 0, 0.8, 0.6]], np.float32)
    assert search(queries, documents, 3).tolist() == [[1, 2, 0], [3, 0, 1]]


def test_prefixes_are_ranked_by_their_own_cosines():
    """A unit vector may have a short prefix: it counts like one that is long."""
    data = RetrievalSet("two", {"q": ""}, {"long": "", "short": ""}, {}, {})
    queries = np.array([[1, 0, 0]], np.float32)
    documents = np.array([[0.6, 0.6, 0.53], [0.1, 0, 0.995]], np.float32)
    assert rank_documents((queries, documents), 2, data) == {"q": ["short", "long"]}


def test_the_memory_of_a_search_does_not_grow_with_the_corpus(monkeypatch):
    generator = np.random.default_rng(0)
    documents = generator.standard_normal((20_000, 4)).astype(np.float32)
    queries = generator.standard_normal((100, 4)).astype(np.float32)
    expected = search(queries, documents, 5)
    monkeypatch.setattr(ranking, "SCORES", 3 * len(documents))
    tracemalloc.start()
    found = search(queries, documents, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    # All at once, scores alone would take 8 MB.
    assert peak < 2e6
    monkeypatch.setattr(ranking, "SCORES", 1)
    np.testing.assert_array_equal(search(queries[:3], documents, 5), expected[:3])


def test_bootstrap():
    assert bootstrap(np.zeros(50)) == (0, 0)
    sample = np.random.default_rng(1).normal(0.1, 0.1, 400)
    half = 1.96 * sample.std() / 20
    expected = (sample.mean() - half, sample.mean() + half)
    np.testing.assert_allclose(bootstrap(sample), expected, atol=0.2 * half)
    np.testing.assert_allclose(interval(np.arange(1001)), (25, 975))


def test_equal_vectors_lose_nothing_and_swapped_ones_show(folder):
    data = read_beir(folder)
    generator = np.random.default_rng(0)
    documents = generator.standard_normal((5, 64)).astype(np.float32)
    queries = documents[:3] + 0.1 * generator.standard_normal((3, 64)).astype(np.float32)
    right = vector_quality((queries, documents), mrl_dims(64), data)
    same = compare_quality(right, right, data, "fp16, cuda")
    assert same.ndcg_loss == 0
    assert {(row.low, row.high) for row in same.rows} == {(0, 0)}
    assert [row.dimension for row in same.rows] == [64] * 3 + [32] * 3
    assert same.rows[0].artifact == 1
    assert same.reference == "fp16, cuda"
    wrong = vector_quality((queries[::-1], documents), mrl_dims(64), data)
    swapped = compare_quality(wrong, right, data, "fp16, cuda")
    assert swapped.ndcg_loss is not None
    assert swapped.ndcg_loss > 0.2


def test_reranking(folder):
    data = read_beir(folder)
    assert len(candidate_pairs(data)) == 15
    right = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]], np.float32).ravel()
    qualities = (score_quality(scores, data) for scores in (1 - right, right))
    report = compare_quality(*qualities, data, "fp16, cuda")
    assert report.before == pytest.approx((1 + 1 / log2(3) + 1 / log2(4)) / 3)
    assert report.rows[0].reference == 1
    assert report.ndcg_loss == pytest.approx(1 - 1 / log2(6))


def test_equal_scores_measure_nothing(folder):
    """All candidates stay where they were, on both sides: that is no agreement."""
    data = read_beir(folder)
    found, expected = (score_quality(np.full(15, value, "f4"), data) for value in (0.4, 0.5))
    report = compare_quality(found, expected, data, "fp32, cpu")
    assert (report.measured, report.ndcg_loss) == (False, None)
    # One query's are enough.
    expected = score_quality(np.array([0.1, *[0.5] * 14], np.float32), data)
    assert compare_quality(found, expected, data, "fp32, cpu").ndcg_loss is not None


def test_a_reference_that_finds_nothing_measures_nothing(folder):
    """Nothing can be lost of a quality of zero."""
    data = read_beir(folder)
    right = score_quality(np.arange(15, dtype=np.float32), data)
    nothing = replace(right, measures={0: {"nDCG@10": np.zeros(3)}})
    report = compare_quality(nothing, nothing, data, "fp32, cpu")
    assert (report.measured, report.ndcg_loss) == (False, None)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_validate_measures_retrieval(checkpoints, tmp_path, folder, task):
    checkpoint = checkpoints("kv2", task)
    artifact = embedport.export(checkpoint, tmp_path / "artifact").folder
    save_run = tmp_path / "run.tsv" if task == "embedding" else None
    report = embedport.validate(artifact, checkpoint, retrieval=folder, save_run=save_run)
    assert report.passed
    assert report.retrieval is not None
    assert report.retrieval.queries == 3
    assert report.retrieval.ndcg_loss == 0
    assert "nDCG@10 loss" in [gate.name for gate in report.gates]
    run = report.comparisons[0].reference
    title = f"Retrieval on small: 3 queries, 5 documents, against {run}"
    assert title in report.to_markdown()
    record = json.loads((artifact / "embedport.json").read_text())["parity"]["retrieval"]
    assert record["rows"][0]["measure"] == "nDCG@10"
    if save_run is not None:
        run = read_beir(folder, candidates=save_run).candidates
        assert {len(each) for each in run.values()} == {5}


def test_a_loss_fails_the_gate(checkpoints, tmp_path, folder, monkeypatch):
    checkpoint = checkpoints("kv2")
    artifact = embedport.export(checkpoint, tmp_path / "artifact").folder
    monkeypatch.setattr(RetrievalReport, "ndcg_loss", 0.1)
    report = embedport.validate(artifact, checkpoint, retrieval=folder, max_ndcg_loss=0.09)
    assert [gate.name for gate in report.gates if gate.failed] == ["nDCG@10 loss"]


def test_nan_in_the_set_fails_on_either_side(checkpoints, tmp_path, folder, monkeypatch):
    """A vector of NaN ranks as one of zeros: the loss alone would not show it."""
    checkpoint = checkpoints("kv2")
    artifact = embedport.export(checkpoint, tmp_path / "artifact").folder
    for kind, method, gate in (
        (EmbeddingTask, "run_set", "retrieval: NaN or infinity"),
        (LibraryReference, "encode_set", "retrieval: reference's NaN"),
    ):
        run = getattr(kind, method)

        def spoilt(self, *args, run=run, **options):
            queries, documents = run(self, *args, **options)
            documents[3] = np.nan
            return queries, documents

        with monkeypatch.context() as changes:
            changes.setattr(kind, method, spoilt)
            report = embedport.validate(artifact, checkpoint, retrieval=folder)
        assert {each.name for each in report.gates if each.failed} >= {gate}
        assert next(each.value for each in report.gates if each.name == gate) == 1


@pytest.mark.parametrize(("spoilt", "used"), [((), "fp16"), (("fp16",), "bf16")])
def test_the_reference_on_a_set_is_named(checkpoints, tmp_path, folder, monkeypatch, spoilt, used):
    """On a set it may be another run than on the texts: the first one without NaN there."""
    checkpoint = checkpoints("kv2")
    artifact = embedport.export(checkpoint, tmp_path / "artifact").folder
    run, encode = LibraryReference.run, LibraryReference.encode_set

    def run_in_fp32(self, inputs, arithmetic, *, progress=False):
        return run(self, inputs, "fp32")

    def encode_in_fp32(self, data, arithmetic, *, progress):
        queries, documents = encode(self, data, "fp32")
        return queries, documents * (np.nan if arithmetic in spoilt else 1)

    monkeypatch.setattr(LibraryReference, "arithmetics", lambda self: ("fp16", "bf16"))
    monkeypatch.setattr(LibraryReference, "run", run_in_fp32)
    monkeypatch.setattr(LibraryReference, "encode_set", encode_in_fp32)
    report = embedport.validate(artifact, checkpoint, retrieval=folder)
    assert report.retrieval is not None
    assert report.retrieval.reference == f"{used}, cpu"
    assert report.comparisons[0].reference == "fp16, cpu"


def test_a_reranker_needs_candidates(checkpoints, tmp_path):
    checkpoint = checkpoints("kv2", "reranker")
    artifact = embedport.export(checkpoint, tmp_path / "artifact").folder
    data = write_set(tmp_path / "small", candidates=False)
    with pytest.raises(InputError, match="no candidates to rerank"):
        embedport.validate(artifact, checkpoint, retrieval=data)
    with pytest.raises(InputError, match="`save_run` writes"):
        embedport.validate(artifact, checkpoint, retrieval=data, save_run=tmp_path / "run.tsv")
