"""The trained pair that ships: its size, its layout, and what it knows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.texts.beir import read_beir
from embedport.texts.ranking import measure, rank_candidates, rank_documents
from embedport.validation.retrieval import encode_set, score_set

QUERIES = 400
# Queries on which the reranker's weights were chosen: its README.
CHOSEN_ON = 600
CANDIDATES = 50
# float32 [pairs]: the reranker's scores in fp32, on a CPU, of `unseen` and its candidates. It takes
# a minute and more to compute them: score_set(reranker, unseen, progress=False).
SCORES = Path(__file__).parents[1] / "data" / "demo-reranker-scores.npy"


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ndcg(ranking, data):
    return measure(ranking, data.relevance, ("nDCG@10",))["nDCG@10"].mean()


@pytest.fixture(scope="module")
def data():
    return read_beir("builtin", max_queries=QUERIES)


def test_it_is_small():
    assert size(builtin_embedder()) + size(builtin_reranker()) <= 16e6
    assert size(builtin_embedder().parent / "retrieval") <= 2e6


@pytest.mark.parametrize(
    ("folder", "task"), [(builtin_embedder(), "embedding"), (builtin_reranker(), "reranker")]
)
def test_they_are_checkpoints_of_the_family(folder, task):
    spec = ModelSpec.from_checkpoint(folder)
    assert spec.task == task
    assert spec.tied
    assert spec.num_kv_heads < spec.num_heads


def test_the_held_out_set():
    data = read_beir("builtin")
    assert len(data.queries) == 2000
    assert len(data.documents) == 6000
    assert {len(each) for each in data.candidates.values()} == {50}
    # A query that is also a document would find itself.
    assert not set(data.queries.values()) & set(data.documents.values())


@pytest.mark.slow  # the demo, which has its own test, ranks with int8 too
def test_quality(data, tmp_path):
    """The embedder is far above BM25; int8 and MRL cost little, a random projection more."""
    import bm25s

    ids = list(data.documents)
    retriever = bm25s.BM25()
    options: dict[str, Any] = {"stopwords": "en", "show_progress": False}
    retriever.index(bm25s.tokenize(list(data.documents.values()), **options), show_progress=False)
    found, _ = retriever.retrieve(
        bm25s.tokenize(list(data.queries.values()), **options), k=100, show_progress=False
    )
    rows = zip(data.queries, found.tolist(), strict=True)
    lexical = ndcg({query: [ids[i] for i in row] for query, row in rows}, data)
    vectors = {}
    for precision in ("fp32", "int8"):
        artifact = embedport.export(builtin_embedder(), tmp_path / precision, precision=precision)
        embedder = embedport.load(artifact.folder, device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        vectors[precision] = encode_set(embedder, data, progress=False)
    quality = ndcg(rank_documents(vectors["fp32"], 256, data), data)
    assert quality > 2 * lexical
    assert ndcg(rank_documents(vectors["int8"], 256, data), data) > quality - 0.01
    for dim in (128, 64):
        projection = np.random.default_rng(0).standard_normal((256, dim)).astype(np.float32)
        queries, documents = vectors["fp32"]
        projected = (queries @ projection, documents @ projection)
        prefix = ndcg(rank_documents(vectors["fp32"], dim, data), data)
        assert prefix > ndcg(rank_documents(projected, dim, data), data) + 0.01


def only(data, queries):
    """The part of a set that is about some queries."""
    return replace(
        data,
        queries={query: data.queries[query] for query in queries},
        relevance={query: data.relevance[query] for query in queries},
        candidates={query: data.candidates[query] for query in queries},
    )


@pytest.fixture(scope="module")
def unseen():
    """All queries that took no part in choosing the reranker's weights."""
    data = read_beir("builtin")
    chosen_on = read_beir("builtin", max_queries=CHOSEN_ON).queries
    return only(data, [query for query in data.queries if query not in chosen_on])


@pytest.mark.parametrize("step", [70, pytest.param(14, marks=pytest.mark.slow)])
def test_the_recorded_scores_are_the_rerankers(unseen, tmp_path, step):
    """On a part of the queries: other weights would give other scores everywhere."""
    few = only(unseen, list(unseen.queries)[::step])
    artifact = embedport.export(builtin_reranker(), tmp_path / "reranker")
    reranker = embedport.load(artifact.folder, device="cpu")
    assert isinstance(reranker, embedport.Reranker)
    found = score_set(reranker, few, progress=False).reshape(-1, CANDIDATES)
    recorded = np.load(SCORES).reshape(-1, CANDIDATES)[::step]
    np.testing.assert_allclose(found, recorded, atol=1e-4, rtol=0)


def test_reranking_improves_the_order(unseen):
    """nDCG@10 of words, definitions and both together, by the recorded scores of all pairs.

    A sample of the queries would not do: what reranking gains is less than the noise of a few
    hundred.
    """
    data, before = unseen, unseen.candidates
    after = rank_candidates(before, np.load(SCORES))
    assert ndcg(after, data) > ndcg(before, data) + 0.005
    for kind, least in (("word-", 0.01), ("definition-", 0.0)):
        asked = [query for query in data.queries if query.startswith(kind)]
        own = replace(data, relevance={query: data.relevance[query] for query in asked})
        there, then = ({query: each[query] for query in asked} for each in (before, after))
        assert ndcg(then, own) > ndcg(there, own) + least
