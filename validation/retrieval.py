"""Retrieval quality: the artifact's and the reference's on one set of queries and documents.

nDCG@10, recall@100 and MRR come from ir-measures, query by query; the difference has a bootstrap
interval over the queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..beir import RetrievalSet
from ..ranking import NDCG, Vectors, candidate_pairs, measure, rank_candidates, rank_documents
from ..runtimes import Embedder, Reranker
from ..runtimes.vectors import MRL_DIMS
from .measures import finite_rows

EMBEDDER_MEASURES = (NDCG, "R@100", "RR")
RERANKER_MEASURES = (NDCG,)
CANDIDATES = 50
RESAMPLES = 2000
CONFIDENCE = 95


@dataclass(frozen=True)
class SetQuality:
    """How good a ranking of a retrieval set is, query by query.

    Attributes:
        measures: Leading values of the vectors (0 for a reranker) to measure to float64 [queries],
            in the order of the set's queries.
        lost: Of each query: vectors or scores with NaN or infinity, int64 [queries].
        lost_documents: Documents' vectors with NaN or infinity.
        varies: Of each query: whether its scores differ, bool [queries]; a ranking by equal scores
            says nothing.
    """

    measures: Mapping[int, Mapping[str, np.ndarray]]
    lost: np.ndarray
    lost_documents: int
    varies: np.ndarray

    @property
    def nonfinite(self) -> int:
        """Vectors or scores with NaN or infinity."""
        return int(self.lost.sum()) + self.lost_documents


@dataclass(frozen=True)
class RetrievalRow:
    """One measure of the artifact and of the reference, the mean over the queries.

    Attributes:
        measure: "nDCG@10", "R@100" (recall) or "RR" (whose mean is MRR).
        dimension: Of the vectors; None for a reranker.
        artifact: The artifact's.
        reference: The reference's.
        difference: Artifact less reference.
        low: Of the difference's 95 % bootstrap interval.
        high: Of the same.
    """

    measure: str
    dimension: int | None
    artifact: float
    reference: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class RetrievalReport:
    """Retrieval quality on one set.

    Attributes:
        name: The set's.
        queries: How many.
        documents: How many.
        reference: What the reference ran in, and on.
        rows: The full width first.
        before: nDCG@10 of a reranker's candidates as they came; None for an embedder.
        measured: False where the reference's scores do not rank any query's candidates.
    """

    name: str
    queries: int
    documents: int
    reference: str
    rows: tuple[RetrievalRow, ...]
    before: float | None = None
    measured: bool = True

    @property
    def ndcg_loss(self) -> float | None:
        """The reference's nDCG@10 less the artifact's, at the full width; None: not measured."""
        if not self.measured:
            return None
        return -next(row.difference for row in self.rows if row.measure == NDCG)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [queries], seeded."""
    generator = np.random.default_rng(0)
    count = len(differences)
    means = [differences[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def choose_dims(width: int) -> tuple[int, ...]:
    """The widths at which vectors are ranked: the whole, and each MRL dimension below it."""
    return (width, *(dim for dim in MRL_DIMS if dim < width))


def vector_quality(vectors: Vectors, dims: Sequence[int], data: RetrievalSet) -> SetQuality:
    """Rank all documents by vectors.

    Args:
        vectors: (queries [n, dim], documents [m, dim]).
        dims: Leading values to rank by.
        data: The set.
    """
    queries, documents = vectors
    return SetQuality(
        {
            dim: measure(rank_documents(vectors, dim, data), data.relevance, EMBEDDER_MEASURES)
            for dim in dims
        },
        (~finite_rows(queries)).astype(np.int64),
        int((~finite_rows(documents)).sum()),
        np.ones(len(queries), bool),
    )


def score_quality(scores: np.ndarray, data: RetrievalSet) -> SetQuality:
    """Rank each query's candidates by the scores of `candidate_pairs(data)`, [pairs]."""
    before = {query: data.candidates[query] for query in data.queries}
    ranking = rank_candidates(before, np.nan_to_num(scores))
    parts = np.split(scores, np.cumsum([len(each) for each in before.values()])[:-1])
    return SetQuality(
        {0: measure(ranking, data.relevance, RERANKER_MEASURES)},
        np.array([(~finite_rows(own)).sum() for own in parts], np.int64),
        0,
        np.array([len(np.unique(own)) > 1 for own in parts], bool),
    )


def compare_quality(
    found: SetQuality, expected: SetQuality, data: RetrievalSet, run: str
) -> RetrievalReport:
    """The artifact's ranking against the reference's.

    Args:
        found: The artifact's.
        expected: The reference's, at the same widths.
        data: The set.
        run: The reference's run, by its name.
    """
    rows = [
        _row(name, dim or None, values, expected.measures[dim][name])
        for dim, measures in found.measures.items()
        for name, values in measures.items()
    ]
    before = None
    if 0 in found.measures:
        candidates = {query: data.candidates[query] for query in data.queries}
        before = float(measure(candidates, data.relevance, RERANKER_MEASURES)[NDCG].mean())
    return RetrievalReport(
        data.name,
        len(data.queries),
        len(data.documents),
        run,
        tuple(rows),
        before,
        bool(expected.varies.any()),
    )


def encode_set(embedder: Embedder, data: RetrievalSet, *, progress: bool) -> Vectors:
    """The artifact's vectors: (queries [n, dim], documents [m, dim])."""
    return (
        embedder.encode(list(data.queries.values()), prompt="query", progress=progress),
        embedder.encode(list(data.documents.values()), prompt="document", progress=progress),
    )


def score_set(reranker: Reranker, data: RetrievalSet, *, progress: bool) -> np.ndarray:
    """The artifact's scores of all candidates, [pairs]."""
    return reranker.score(candidate_pairs(data), progress=progress)


def _row(
    name: str, dimension: int | None, artifact: np.ndarray, reference: np.ndarray
) -> RetrievalRow:
    differences = artifact - reference
    low, high = bootstrap(differences)
    return RetrievalRow(
        name,
        dimension,
        float(artifact.mean()),
        float(reference.mean()),
        float(differences.mean()),
        low,
        high,
    )
