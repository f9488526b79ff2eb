"""Retrieval quality: the artifact's and the reference's on one set of queries and documents.

nDCG@10, recall@100 and MRR come from ir-measures, query by query; the difference has a bootstrap
interval over the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..beir import RetrievalSet
from ..demo.samples import Pair, Sample
from ..ranking import NDCG, Vectors, candidate_pairs, measure, rank_candidates, rank_documents
from ..runtimes import Embedder, Reranker
from ..runtimes.vectors import MRL_DIMS
from .reference import Arithmetic, Reference, embedding_ids, reranker_ids, run_reference

EMBEDDER_MEASURES = (NDCG, "R@100", "RR")
RERANKER_MEASURES = (NDCG,)
CANDIDATES = 50
RESAMPLES = 2000
CONFIDENCE = 95


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
    """

    name: str
    queries: int
    documents: int
    reference: str
    rows: tuple[RetrievalRow, ...]
    before: float | None = None

    @property
    def ndcg_loss(self) -> float:
        """The reference's nDCG@10 less the artifact's, at the full width."""
        return -next(row.difference for row in self.rows if row.measure == NDCG)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [queries], seeded."""
    generator = np.random.default_rng(0)
    count = len(differences)
    means = [differences[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def compare_embedders(
    found: Vectors,
    expected: Vectors,
    data: RetrievalSet,
    run: str,
) -> RetrievalReport:
    """Rank all documents by the artifact's and by the reference's vectors, at each dimension.

    Args:
        found: The artifact's (queries [n, dim], documents [m, dim]).
        expected: The reference's, as wide or wider.
        data: The set.
        run: The reference's run, by its name.
    """
    width = found[0].shape[1]
    rows: list[RetrievalRow] = []
    for dim in (width, *(dim for dim in MRL_DIMS if dim < width)):
        values = [
            measure(rank_documents(vectors, dim, data), data.relevance, EMBEDDER_MEASURES)
            for vectors in (found, expected)
        ]
        rows += [_row(name, dim, *(each[name] for each in values)) for name in EMBEDDER_MEASURES]
    return RetrievalReport(data.name, len(data.queries), len(data.documents), run, tuple(rows))


def compare_rerankers(
    found: np.ndarray, expected: np.ndarray, data: RetrievalSet, run: str
) -> RetrievalReport:
    """Rank each query's candidates by the artifact's and by the reference's scores.

    Args:
        found: The artifact's scores of `candidate_pairs(data)`, [pairs].
        expected: The reference's.
        data: The set.
        run: The reference's run, by its name.
    """
    before = {query: data.candidates[query] for query in data.queries}
    after = [
        measure(rank_candidates(before, np.nan_to_num(scores)), data.relevance, RERANKER_MEASURES)
        for scores in (found, expected)
    ]
    rows = [_row(name, None, *(each[name] for each in after)) for name in RERANKER_MEASURES]
    first = float(measure(before, data.relevance, RERANKER_MEASURES)[NDCG].mean())
    sizes = (len(data.queries), len(data.documents))
    return RetrievalReport(data.name, *sizes, run, tuple(rows), first)


def encode_set(embedder: Embedder, data: RetrievalSet, *, progress: bool) -> Vectors:
    """The artifact's vectors: (queries [n, dim], documents [m, dim])."""
    return (
        embedder.encode(list(data.queries.values()), prompt="query", progress=progress),
        embedder.encode(list(data.documents.values()), prompt="document", progress=progress),
    )


def encode_reference(
    reference: Reference, data: RetrievalSet, arithmetic: Arithmetic, device: str, *, progress: bool
) -> Vectors:
    """The reference's vectors: (queries [n, hidden_size], documents [m, hidden_size])."""
    samples = [Sample(text, "query") for text in data.queries.values()]
    samples += [Sample(text, "document") for text in data.documents.values()]
    rows = embedding_ids(reference, samples)
    vectors = run_reference(reference, rows, arithmetic, device, progress=progress)
    return vectors[: len(data.queries)], vectors[len(data.queries) :]


def score_set(reranker: Reranker, data: RetrievalSet, *, progress: bool) -> np.ndarray:
    """The artifact's scores of all candidates, [pairs]."""
    return reranker.score(candidate_pairs(data), progress=progress)


def score_reference(
    reference: Reference, data: RetrievalSet, arithmetic: Arithmetic, device: str, *, progress: bool
) -> np.ndarray:
    """The reference's scores of all candidates, [pairs]."""
    rows = reranker_ids(reference, [Pair(*pair) for pair in candidate_pairs(data)])
    return run_reference(reference, rows, arithmetic, device, progress=progress)


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
