"""Ranks a retrieval set's documents by vectors or scores, and measures the rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, require
from .beir import RetrievalSet

NDCG = "nDCG@10"
TOP = 100
# Scores computed at once; each takes 16 bytes while they are sorted.
SCORES = 1 << 22

Ranking = Mapping[str, Sequence[str]]
# (queries [n, dim], documents [m, dim])
Vectors = tuple[np.ndarray, np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Normalize rows to unit length, float64 [n, dim]; a row with infinity becomes NaN."""
    vectors = vectors.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity / infinity
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)


def search(queries: np.ndarray, documents: np.ndarray, top: int = TOP) -> np.ndarray:
    """Exact search: the nearest documents of each query by cosine.

    Args:
        queries: Unit vectors [n, dim].
        documents: Unit vectors [m, dim], at least one.
        top: Number of documents per query.

    Returns:
        Document indices, int64 [n, min(top, m)], best first; ties in document order.
    """
    best = np.empty((len(queries), min(top, len(documents))), np.int64)
    block = max(1, SCORES // len(documents))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ documents.T
        best[start : start + block] = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return best


def measure(
    ranking: Ranking, relevance: Mapping[str, Mapping[str, int]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Compute retrieval measures for each query's ranking.

    Args:
        ranking: Query id to document ids, best first.
        relevance: Query id to document id to relevance.
        names: Names of the measures in ir-measures, with their cutoffs, as "nDCG@10".

    Returns:
        Name to float64 [queries], in the order of `ranking`.
    """
    ir_measures = require("ir_measures", "retrieval")
    # ir-measures' own parser of names takes classes of `ast` that Python 3.14 no longer has.
    measures = {_find_measure(ir_measures, name): name for name in names}
    # Negative ranks serve as scores: ir-measures would order equal scores by id.
    run = {
        query: {document: -float(rank) for rank, document in enumerate(documents)}
        for query, documents in ranking.items()
    }
    qrels = {query: dict(relevance[query]) for query in ranking}
    position = {query: i for i, query in enumerate(ranking)}
    values = {name: np.zeros(len(ranking)) for name in names}
    for result in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[result.measure]][position[result.query_id]] = result.value
    return values


def _find_measure(ir_measures: Any, name: str) -> Any:
    kind, _, cutoff = name.partition("@")
    measure = getattr(ir_measures, kind)
    return measure @ int(cutoff) if cutoff else measure


def rank_documents(
    vectors: Vectors, dim: int, data: RetrievalSet, top: int = TOP
) -> dict[str, list[str]]:
    """Each query's nearest documents by the first `dim` values of (queries, documents)."""
    queries, documents = (unit(matrix[:, :dim]).astype(np.float32) for matrix in vectors)
    ids = list(data.documents)
    best = search(np.nan_to_num(queries), np.nan_to_num(documents), top)
    return {
        query: [ids[i] for i in row] for query, row in zip(data.queries, best.tolist(), strict=True)
    }


def rank_candidates(before: Ranking, scores: np.ndarray) -> dict[str, list[str]]:
    """Reorder each query's candidates by the scores [pairs] of `candidate_pairs`."""
    ranking, start = {}, 0
    for query, documents in before.items():
        query_scores = scores[start : start + len(documents)]
        ranking[query] = [documents[i] for i in np.argsort(-query_scores, kind="stable")]
        start += len(documents)
    return ranking


def candidate_pairs(data: RetrievalSet) -> list[tuple[str, str]]:
    """(query, document) texts of all candidates.

    Raises:
        InputError: A query has no candidates.
    """
    for query in data.queries:
        if query not in data.candidates:
            raise InputError(
                f"{data.name}: query {query!r} has no candidates to rerank; make them with an "
                "embedder: embedport validate EMBEDDER --reference … --retrieval … --save-run "
                "candidates.tsv, then give `candidates` candidates.tsv"
            )
    return [
        (data.queries[query], data.documents[document])
        for query in data.queries
        for document in data.candidates[query]
    ]
