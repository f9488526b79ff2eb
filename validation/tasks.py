"""Embedding and reranking behind one interface: inputs, how to run them, and what to compare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from ..checkpoint.spec import Task
from ..errors import InputError
from ..runtimes import Embedder, Reranker
from ..runtimes.batching import group_indices
from ..runtimes.embedder import check_encoded, describe_nonfinite
from ..runtimes.vectors import MRL_DIMS, cosines, mrl_dims
from ..texts.beir import RetrievalSet
from ..texts.prompts import Encoded, check_list, check_text, is_pair
from ..texts.ranking import Vectors, unit
from ..texts.samples import Pair, Sample, builtin_pairs, builtin_samples, prompted_samples
from .measures import cosine_figures, difference_figures, finite_rows, rank_figures, sigmoid
from .report import Comparison, Gate, Sense
from .retrieval import SetQuality, encode_set, score_quality, score_set, vector_quality
from .thresholds import Thresholds

logger = logging.getLogger(__name__)

# Prompts that mark a document; every other prompt marks a query.
DOCUMENTS = ("document", "", None)
# The MRL dimension with a gate of its own: a width at which vectors are often stored.
MRL_GATE = 256
# Vectors whose length is this close to 1 count as unit vectors: the rest is rounding.
UNIT = 1e-2


@dataclass(frozen=True)
class EmbeddingTask:
    """Texts to vectors."""

    inputs: list[Sample]
    sense: ClassVar[Sense] = "≥"  # a higher cosine is better

    @property
    def names(self) -> list[str]:
        """Each text's name in the report."""
        return [
            f"text {i} ({'default prompt' if sample.prompt is None else sample.prompt})"
            for i, sample in enumerate(self.inputs)
        ]

    @property
    def texts(self) -> list[str]:
        """Each input as the report quotes it."""
        return [sample.text for sample in self.inputs]

    @property
    def is_query(self) -> np.ndarray:
        """Mask of the texts that are queries, not documents: bool [texts]."""
        return np.array([sample.prompt not in DOCUMENTS for sample in self.inputs])

    def artifact_ids(self, embedder: Embedder) -> list[np.ndarray]:
        """Each text's token ids, by the artifact's tokenizer.

        Raises:
            InputError: A text is not valid Unicode, or its prompt's name is unknown.
        """
        return self._encode(embedder).ids

    def run(self, embedder: Embedder, *, progress: bool) -> np.ndarray:
        """The artifact's vectors: float32 [texts, dim]."""
        encoded = self._encode(embedder)
        check_encoded(encoded, embedder.info.vocab_size, embedder.tokenizer.max_length, "text")
        vectors = np.empty((len(self.inputs), embedder.dim), np.float32)
        for prompt, indices in self._by_prompt():
            vectors[indices] = embedder.embed_rows(
                [encoded.ids[i] for i in indices],
                prompt_length=embedder.prompt_length(embedder.prompt_text(prompt)),
                progress=progress,
            )
        if message := describe_nonfinite(vectors, embedder.precision, "text"):
            logger.error(message)
        return vectors

    def agreement(self, results: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """The row-wise cosines: [n, dim] and [n, dim or more] to float64 [n]."""
        return cosines(results, expected[:, : results.shape[1]])

    def comparable(self, results: np.ndarray) -> np.ndarray:
        """The artifact's vectors, unchanged."""
        return results

    def scores(self, results: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of every query with every document, of vectors that are finite on both sides.

        Scores are cosines. If the reference normalizes its vectors, the artifact's score is the
        plain dot product, as users compute it, so a vector that is not of unit length shows.

        Args:
            results: float32 [texts, dim].
            expected: float32 [texts, dim or more].

        Returns:
            (the artifact's, the reference's), float64 [queries, documents].
        """
        if not _is_unit(expected):
            results = unit(results)
        expected = unit(expected[:, : results.shape[1]])
        good = finite_rows(results) & finite_rows(expected)
        queries, documents = good & self.is_query, good & ~self.is_query
        scores = results[queries].astype(np.float64) @ results[documents].T
        return scores, expected[queries] @ expected[documents].T

    def compare(self, results: np.ndarray, expected: np.ndarray, run: str) -> Comparison:
        """Compare the artifact's vectors with one run of the reference.

        Args:
            results: float32 [texts, dim].
            expected: float32 [texts, dim or more]: an artifact may have a baked-in MRL dimension.
            run: The run's name.
        """
        width = results.shape[1]
        scores, expected_scores = self.scores(results, expected)
        good = finite_rows(results) & finite_rows(expected[:, :width])
        expected = unit(expected[:, :width])
        return Comparison(
            reference=run,
            reference_nonfinite=int((~finite_rows(expected)).sum()),
            compared=int(good.sum()),
            figures=cosine_figures(results[good], expected[good])
            | difference_figures(scores, expected_scores)
            | rank_figures(zip(scores, expected_scores, strict=True)),
            dimensions={
                dim: cosine_figures(results[good, :dim], expected[good, :dim])
                for dim in MRL_DIMS
                if dim < width and good.any()
            },
        )

    def run_set(self, embedder: Embedder, data: RetrievalSet, *, progress: bool) -> Vectors:
        """The artifact's vectors of a retrieval set."""
        return encode_set(embedder, data, progress=progress)

    def measure(self, results: Vectors, data: RetrievalSet) -> SetQuality:
        """The artifact's retrieval quality, from the vectors that `run_set` returned."""
        return vector_quality(results, mrl_dims(results[0].shape[1]), data)

    def gates(
        self,
        comparison: Comparison,
        results: np.ndarray,
        expected: np.ndarray,
        thresholds: Thresholds,
    ) -> list[Gate]:
        """The gates on the artifact's vectors and on their comparison with the reference's.

        Args:
            comparison: From `compare`.
            results: float32 [texts, dim].
            expected: float32 [texts, dim or more].
            thresholds: The limits.
        """
        figures, limit = comparison.figures, thresholds.min_cosine
        gates = [
            _length_gate(results, expected, thresholds),
            Gate("minimum cosine", figures.get("minimum cosine", np.nan), "≥", limit),
        ]
        if MRL_GATE in comparison.dimensions:
            value = comparison.dimensions[MRL_GATE]["minimum cosine"]
            gates.append(Gate(f"minimum cosine at {MRL_GATE} dimensions", value, "≥", limit))
        # There are no scores without queries.
        if "maximum score difference" in figures:
            gates.append(_score_gate(comparison, thresholds))
        return gates

    def invariance_limit(self, thresholds: Thresholds) -> float:
        """The limit for the invariance suite."""
        return thresholds.min_invariance

    def _encode(self, embedder: Embedder) -> Encoded:
        """Each text's token ids with its prompt, in the order of the texts."""
        rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(self.inputs)
        truncated: list[int] = []
        for prompt, indices in self._by_prompt():
            texts = [self.inputs[i].text for i in indices]
            encoded = embedder.tokenizer.encode(texts, embedder.prompt_text(prompt))
            for i, row in zip(indices, encoded.ids, strict=True):
                rows[i] = row
            truncated += [indices[i] for i in encoded.truncated]
        return Encoded(rows, sorted(truncated))

    def _by_prompt(self) -> Iterable[tuple[str | None, list[int]]]:
        """Each prompt with the indices of its texts."""
        for i, sample in enumerate(self.inputs):
            check_text(i, (sample.prompt or "") + sample.text)
        return group_indices(sample.prompt for sample in self.inputs).items()


@dataclass(frozen=True)
class RerankerTask:
    """Pairs of texts to probabilities.

    Attributes:
        inputs: The pairs.
        log_odds: Whether the model's library, and therefore the artifact, returns log-odds. They
            are compared as probabilities, because the limits apply to probabilities.
    """

    inputs: list[Pair]
    log_odds: bool = False
    sense: ClassVar[Sense] = "≤"  # a lower difference is better

    @property
    def names(self) -> list[str]:
        """Each pair's name in the report."""
        return [f"pair {i}" for i in range(len(self.inputs))]

    @property
    def texts(self) -> list[str]:
        """Each input as the report quotes it."""
        return [f"{pair.query} | {pair.document}" for pair in self.inputs]

    def artifact_ids(self, reranker: Reranker) -> list[np.ndarray]:
        """Each pair's token ids, by the artifact's tokenizer."""
        rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(self.inputs)
        for instruction, indices in group_indices(pair.instruction for pair in self.inputs).items():
            pairs = [(self.inputs[i].query, self.inputs[i].document) for i in indices]
            encoded = reranker.tokenizer.encode(pairs, instruction)
            for i, row in zip(indices, encoded.ids, strict=True):
                rows[i] = row
        return rows

    def run(self, reranker: Reranker, *, progress: bool) -> np.ndarray:
        """The artifact's scores: float32 [pairs]."""
        return score_pairs(partial(reranker.score_pairs, progress=progress), self.inputs)

    def agreement(self, results: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """The absolute score differences: [n] and [n] to float64 [n]."""
        with np.errstate(invalid="ignore"):  # infinity - infinity
            return np.abs(results.astype(np.float64) - expected)

    def comparable(self, results: np.ndarray) -> np.ndarray:
        """The artifact's scores as probabilities, [pairs]; NaN and infinity stay as they are."""
        return sigmoid(results) if self.log_odds else results

    def scores(self, results: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(artifact's, reference's) scores that are finite on both sides: float64 [pairs]."""
        good = finite_rows(results) & finite_rows(expected)
        return results[good].astype(np.float64), expected[good].astype(np.float64)

    def compare(self, results: np.ndarray, expected: np.ndarray, run: str) -> Comparison:
        """Compare the artifact's scores [pairs] with one run of the reference [pairs]."""
        good = finite_rows(results) & finite_rows(expected)
        return Comparison(
            reference=run,
            reference_nonfinite=int((~finite_rows(expected)).sum()),
            compared=int(good.sum()),
            figures=difference_figures(results[good], expected[good])
            | rank_figures((results[rows], expected[rows]) for rows in self._by_query(good)),
            dimensions={},
        )

    def run_set(self, reranker: Reranker, data: RetrievalSet, *, progress: bool) -> np.ndarray:
        """The artifact's scores of a retrieval set's candidates, [pairs]."""
        return score_set(reranker, data, progress=progress)

    def measure(self, results: np.ndarray, data: RetrievalSet) -> SetQuality:
        """The artifact's reranking quality, from the scores that `run_set` returned."""
        return score_quality(results, data)

    def gates(
        self,
        comparison: Comparison,
        results: np.ndarray,
        expected: np.ndarray,
        thresholds: Thresholds,
    ) -> list[Gate]:
        """The gates on the comparison of the artifact's scores with the reference's.

        Args:
            comparison: From `compare`.
            results: float32 [pairs].
            expected: float32 [pairs].
            thresholds: The limits.
        """
        return [
            _score_gate(comparison, thresholds),
            self._order_gate(results, expected, thresholds.tie_margin),
        ]

    def _order_gate(self, results: np.ndarray, expected: np.ndarray, margin: float) -> Gate:
        """The gate on document pairs of one query that the artifact does not rank as the reference.

        Documents whose reference scores differ by the margin or less are tied and not counted.
        """
        ordered, swapped, detail = 0, 0, ""
        for rows in self._by_query(finite_rows(results) & finite_rows(expected)):
            order = rows[np.argsort(-expected[rows], kind="stable")]
            for place, higher in enumerate(order[:-1]):
                lower = order[place + 1 :]
                lower = lower[expected[higher] - expected[lower] > margin]
                swapped_documents = lower[results[lower] >= results[higher]]
                if len(swapped_documents) and not detail:
                    detail = f"pair {swapped_documents[0]} is not below pair {higher}"
                ordered += len(lower)
                swapped += len(swapped_documents)
        name = "documents out of order"
        if not ordered:
            basis = f"no query has two documents with scores more than {margin:g} apart"
            return Gate(name, None, "≤", 0, basis=basis)
        basis = f"of {ordered:,} pairs with scores more than {margin:g} apart"
        return Gate(name, swapped, "≤", 0, detail, basis)

    def _by_query(self, good: np.ndarray) -> list[np.ndarray]:
        """Indices of each query's pairs where `good`, bool [pairs], is true."""
        queries = group_indices((pair.query, pair.instruction) for pair in self.inputs)
        groups = [np.array(indices) for indices in queries.values()]
        return [rows[good[rows]] for rows in groups if good[rows].any()]

    def invariance_limit(self, thresholds: Thresholds) -> float:
        """The limit for the invariance suite."""
        return thresholds.max_invariance_difference


AnyTask = EmbeddingTask | RerankerTask


def score_pairs(score: Callable[..., np.ndarray], pairs: Sequence[Pair]) -> np.ndarray:
    """Scores of pairs, which may have several instructions.

    Args:
        score: Maps (query, document) tuples and the keyword `instruction` to scores.
        pairs: The pairs.

    Returns:
        float32 [pairs].
    """
    scores = np.empty(len(pairs), np.float32)
    for instruction, indices in group_indices(pair.instruction for pair in pairs).items():
        texts = [(pairs[i].query, pairs[i].document) for i in indices]
        scores[indices] = score(texts, instruction=instruction)
    return scores


def _is_unit(vectors: np.ndarray) -> bool:
    """Whether all finite rows of vectors [n, dim] have unit length."""
    lengths = np.linalg.norm(vectors[finite_rows(vectors)].astype(np.float64), axis=1)
    return bool((np.abs(lengths - 1) < UNIT).all())


def _length_gate(results: np.ndarray, expected: np.ndarray, thresholds: Thresholds) -> Gate:
    """The gate on the vectors' length: 1, or the reference's if it does not normalize."""
    lengths = np.linalg.norm(results.astype(np.float64), axis=1)
    name, limit = "vectors' length to 1", thresholds.max_length_error
    if not _is_unit(expected):
        name = "vectors' length to the reference's"
        lengths /= np.linalg.norm(expected[:, : results.shape[1]].astype(np.float64), axis=1)
        # An error that the cosine limit allows can change the length by this much.
        limit = max(limit, (2 * max(1 - thresholds.min_cosine, 0)) ** 0.5)
    lengths = lengths[np.isfinite(lengths)]
    error = float(np.abs(lengths - 1).max()) if len(lengths) else np.nan
    return Gate(name, error, "≤", limit)


def _score_gate(comparison: Comparison, thresholds: Thresholds) -> Gate:
    name = "maximum score difference"
    value = comparison.figures.get(name, np.nan)
    return Gate(name, value, "≤", thresholds.max_score_difference)


def choose_inputs(
    task: Task,
    texts: Sequence[str | Sample] | None,
    pairs: Sequence[tuple[str, str] | Pair] | None,
    prompts: Iterable[str] = (),
) -> AnyTask:
    """The inputs for an artifact's task: the caller's, or built-in ones.

    Args:
        task: "embedding" or "reranker".
        texts: The caller's texts, for an embedding model.
        pairs: The caller's pairs, for a reranker.
        prompts: Names of the model's prompts; built-in texts are added for each.

    Raises:
        InputError: The inputs are for the other task, or the list is empty.
    """
    for given, noun in ((texts, "texts"), (pairs, "pairs")):
        if given is not None:
            check_list(given, f"{noun} should be a list")
    if task == "embedding":
        if pairs is not None:
            raise InputError("the artifact is an embedding model: give texts, not pairs")
        if texts is None:
            chosen = EmbeddingTask(builtin_samples() + prompted_samples(prompts))
        else:
            chosen = EmbeddingTask(list(map(_sample, texts)))
    else:
        if texts is not None:
            raise InputError("the artifact is a reranker: give pairs, not texts")
        chosen = RerankerTask(builtin_pairs() if pairs is None else list(map(_pair, pairs)))
    if not chosen.texts:
        given = pairs if texts is None else texts
        raise InputError(f"give a list of at least one text or pair, found {given!r}")
    return chosen


def _sample(text: str | Sample) -> Sample:
    return text if isinstance(text, Sample) else Sample(text)


def _pair(pair: tuple[str, str] | Pair) -> Pair:
    if isinstance(pair, Pair):
        return pair
    if not is_pair(pair):
        raise InputError(f"a pair should be (query, document), found {pair!r}")
    return Pair(*pair)
