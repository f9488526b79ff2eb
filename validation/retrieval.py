"""Retrieval quality of the artifact and the reference on one set of queries and documents.

ir-measures computes nDCG@10, recall@100 and MRR query by query; the difference gets a bootstrap
interval over the queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtimes import Embedder, Reranker
from ..texts.beir import RetrievalSet
from ..texts.ranking import NDCG, Vectors, candidate_pairs, measure, rank_candidates, rank_documents
from .measures import finite_rows

EMBEDDER_MEASURES = (NDCG, "R@100", "RR")
RERANKER_MEASURES = (NDCG,)
CANDIDATES = 50
RESAMPLES = 2000
CONFIDENCE = 95


@dataclass(frozen=True)
class SetQuality:
    """Retrieval quality on a retrieval set, query by query.

    Attributes:
        measures: MRL dimension (0 for a reranker) to measure to float64 [queries], in the order of
            the set's queries.
        lost: Number of each query's vectors or scores with NaN or infinity, int64 [queries].
        lost_documents: Number of document vectors with NaN or infinity.
        varies: Whether each query's scores differ, bool [queries]: a ranking by equal scores means
            nothing.
    """

    measures: Mapping[int, Mapping[str, np.ndarray]]
    lost: np.ndarray
    lost_documents: int
    varies: np.ndarray

    @property
    def nonfinite(self) -> int:
        """Number of vectors or scores with NaN or infinity."""
        return int(self.lost.sum()) + self.lost_documents


@dataclass(frozen=True)
class RetrievalRow:
    """One measure of the artifact and of the reference, as means over the queries.

    Attributes:
        measure: "nDCG@10", "R@100" (recall) or "RR" (reciprocal rank; its mean is MRR).
        dimension: The vectors' dimension; None for a reranker.
        artifact: The artifact's value.
        reference: The reference's value.
        difference: Artifact minus reference.
        low: Lower end of the difference's 95 % bootstrap interval.
        high: Upper end of the interval.
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
        name: The set's name.
        queries: Number of queries.
        documents: Number of documents.
        reference: The reference run's arithmetic and device.
        rows: The measures, at full width first.
        before: nDCG@10 of a reranker's candidates in their given order; None for an embedder.
        measured: False if no loss could show: the reference gives every query's candidates equal
            scores, or ranks no relevant document in the top ten.
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
        """The reference's nDCG@10 minus the artifact's, at full width; None if not measured."""
        if not self.measured:
            return None
        return 0 - next(row.difference for row in self.rows if row.measure == NDCG)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of paired differences [queries], seeded."""
    generator = np.random.default_rng(0)
    count = len(differences)
    means = [differences[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    return interval(means)


def interval(resampled: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The interval that holds 95 % of a figure's values on resamples."""
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def vector_quality(vectors: Vectors, dims: Sequence[int], data: RetrievalSet) -> SetQuality:
    """Rank all documents for each query by their vectors, and measure the rankings.

    Args:
        vectors: (queries [n, dim], documents [m, dim]).
        dims: MRL dimensions to rank by.
        data: The retrieval set.
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
    """Rank each query's candidates by scores of `candidate_pairs(data)`, [pairs], and measure."""
    before = {query: data.candidates[query] for query in data.queries}
    ranking = rank_candidates(before, np.nan_to_num(scores))
    by_query = np.split(scores, np.cumsum([len(candidates) for candidates in before.values()])[:-1])
    return SetQuality(
        {0: measure(ranking, data.relevance, RERANKER_MEASURES)},
        np.array([(~finite_rows(query_scores)).sum() for query_scores in by_query], np.int64),
        0,
        np.array([len(np.unique(query_scores)) > 1 for query_scores in by_query], bool),
    )


def compare_quality(
    artifact: SetQuality, reference: SetQuality, data: RetrievalSet, run: str
) -> RetrievalReport:
    """Compare the artifact's retrieval quality with the reference's.

    Args:
        artifact: The artifact's quality.
        reference: The reference's quality, at the same dimensions.
        data: The retrieval set.
        run: The name of the reference's run.
    """
    rows = [
        _row(name, dim or None, values, reference.measures[dim][name])
        for dim, measures in artifact.measures.items()
        for name, values in measures.items()
    ]
    before = None
    if 0 in artifact.measures:
        candidates = {query: data.candidates[query] for query in data.queries}
        before = float(measure(candidates, data.relevance, RERANKER_MEASURES)[NDCG].mean())
    reference_ndcg = next(iter(reference.measures.values()))[NDCG]
    return RetrievalReport(
        data.name,
        len(data.queries),
        len(data.documents),
        run,
        tuple(rows),
        before,
        bool(reference.varies.any() and reference_ndcg.any()),
    )


def encode_set(embedder: Embedder, data: RetrievalSet, *, progress: bool) -> Vectors:
    """The artifact's vectors: (queries [n, dim], documents [m, dim])."""
    return (
        embedder.embed_texts(list(data.queries.values()), prompt="query", progress=progress),
        embedder.embed_texts(list(data.documents.values()), prompt="document", progress=progress),
    )


def score_set(reranker: Reranker, data: RetrievalSet, *, progress: bool) -> np.ndarray:
    """The artifact's scores of all candidates, [pairs]."""
    return reranker.score_pairs(candidate_pairs(data), progress=progress)


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
