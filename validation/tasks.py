"""The two tasks behind one interface: their inputs, how they are run, and what is compared."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..beir import RetrievalSet
from ..demo.samples import Pair, Sample, builtin_pairs, builtin_samples, prompted_samples
from ..errors import InputError
from ..prompts import Encoded, check_text
from ..ranking import Vectors, unit
from ..runtimes import Embedder, Reranker
from ..runtimes.embedder import check_encoded, describe_nonfinite
from ..runtimes.vectors import MRL_DIMS
from ..spec import Task
from .measures import (
    cosine_figures,
    cosines,
    difference_figures,
    finite_rows,
    rank_figures,
)
from .report import Comparison, Gate, Sense
from .retrieval import SetQuality, choose_dims, encode_set, score_quality, score_set, vector_quality
from .thresholds import Thresholds

logger = logging.getLogger(__name__)

# What is no query: the name of documents' prompt, and no prompt at all.
DOCUMENTS = ("document", "", None)
# The narrowest width with a gate of its own: people store vectors of this width.
MRL_GATE = 256
# Vectors this near to length 1 are of unit length, rounding aside.
UNIT = 1e-2


@dataclass(frozen=True)
class EmbeddingTask:
    """Texts to vectors."""

    samples: list[Sample]
    sense: ClassVar[Sense] = "≥"  # of a cosine: more is better

    @property
    def inputs(self) -> list[Sample]:
        """What both sides are given."""
        return self.samples

    @property
    def names(self) -> list[str]:
        """What the report calls each text."""
        return [
            f"text {i} ({'default prompt' if sample.prompt is None else sample.prompt})"
            for i, sample in enumerate(self.samples)
        ]

    @property
    def texts(self) -> list[str]:
        """What the report shows of each."""
        return [sample.text for sample in self.samples]

    @property
    def is_query(self) -> np.ndarray:
        """Which texts are queries, the others being documents: bool [texts]."""
        return np.array([sample.prompt not in DOCUMENTS for sample in self.samples])

    def artifact_ids(self, embedder: Embedder) -> list[np.ndarray]:
        """Token ids as the artifact makes them.

        Raises:
            InputError: A text is not valid Unicode, or its prompt has no such name.
        """
        return self._encode(embedder).ids

    def run(self, embedder: Embedder, *, progress: bool) -> np.ndarray:
        """The artifact's vectors: float32 [texts, dim]."""
        encoded = self._encode(embedder)
        check_encoded(encoded, embedder.facts.vocab_size, embedder.tokenizer.max_length, "text")
        vectors = np.empty((len(self.samples), embedder.dim), np.float32)
        for prompt, numbers in self._by_prompt():
            vectors[numbers] = embedder.embed_rows(
                [encoded.ids[i] for i in numbers],
                prompt_length=embedder.prompt_length(embedder.prompt_text(prompt)),
                progress=progress,
            )
        if wrong := describe_nonfinite(vectors, embedder.precision, "text"):
            logger.error(wrong)
        return vectors

    def agreement(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """The cosine of each vector: [n, dim] and [n, dim or more] to float64 [n]."""
        return cosines(found, expected[:, : found.shape[1]])

    def comparable(self, found: np.ndarray) -> np.ndarray:
        """The artifact's vectors as they are."""
        return found

    def scores(self, found: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of every query and every document, where both sides are finite.

        Cosines; of vectors of unit length plain products, as users compute them, so that a vector
        that is not shows.

        Args:
            found: float32 [texts, dim].
            expected: float32 [texts, dim or more].

        Returns:
            (the artifact's, the reference's), float64 [queries, documents].
        """
        if not _is_unit(expected):
            found = unit(found)
        expected = unit(expected[:, : found.shape[1]])
        good = finite_rows(found) & finite_rows(expected)
        queries, documents = good & self.is_query, good & ~self.is_query
        scores = found[queries].astype(np.float64) @ found[documents].T
        return scores, expected[queries] @ expected[documents].T

    def compare(self, found: np.ndarray, expected: np.ndarray, run: str) -> Comparison:
        """The artifact's vectors against one run of the reference.

        Args:
            found: float32 [texts, dim].
            expected: float32 [texts, hidden_size]; an artifact with a baked MRL dimension is
                narrower.
            run: The run's name.
        """
        width = found.shape[1]
        scores, expected_scores = self.scores(found, expected)
        good = finite_rows(found) & finite_rows(expected[:, :width])
        expected = unit(expected[:, :width])
        return Comparison(
            reference=run,
            reference_nonfinite=int((~finite_rows(expected)).sum()),
            compared=int(good.sum()),
            figures=cosine_figures(found[good], expected[good])
            | difference_figures(scores, expected_scores)
            | rank_figures(zip(scores, expected_scores, strict=True)),
            dimensions={
                dim: cosine_figures(found[good, :dim], expected[good, :dim])
                for dim in MRL_DIMS
                if dim < width and good.any()
            },
        )

    def run_set(self, embedder: Embedder, data: RetrievalSet, *, progress: bool) -> Vectors:
        """The artifact's vectors of a retrieval set."""
        return encode_set(embedder, data, progress=progress)

    def measure(self, found: Vectors, data: RetrievalSet) -> SetQuality:
        """How good the artifact's ranking of a retrieval set is, by what `run_set` gave."""
        return vector_quality(found, choose_dims(found[0].shape[1]), data)

    def gates(
        self,
        comparison: Comparison,
        found: np.ndarray,
        expected: np.ndarray,
        thresholds: Thresholds,
    ) -> list[Gate]:
        """The gates on the artifact's vectors, and on their comparison with the reference's.

        Args:
            comparison: From `compare`.
            found: float32 [texts, dim].
            expected: float32 [texts, dim or more].
            thresholds: The limits.
        """
        figures, limit = comparison.figures, thresholds.min_cosine
        gates = [
            _length_gate(found, expected, thresholds),
            Gate("minimum cosine", figures.get("minimum cosine", np.nan), "≥", limit),
        ]
        if MRL_GATE in comparison.dimensions:
            value = comparison.dimensions[MRL_GATE]["minimum cosine"]
            gates.append(Gate(f"minimum cosine at {MRL_GATE} dimensions", value, "≥", limit))
        # Without queries there are no scores.
        if "maximum score difference" in figures:
            gates.append(_score_gate(comparison, thresholds))
        return gates

    def invariance_limit(self, thresholds: Thresholds) -> float:
        """The limit for the invariance suite."""
        return thresholds.min_invariance

    def _encode(self, embedder: Embedder) -> Encoded:
        """Token ids of each text under its prompt, in the order of the texts."""
        rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(self.samples)
        truncated: list[int] = []
        for prompt, numbers in self._by_prompt():
            texts = [self.samples[i].text for i in numbers]
            encoded = embedder.tokenizer.encode(texts, embedder.prompt_text(prompt))
            for i, row in zip(numbers, encoded.ids, strict=True):
                rows[i] = row
            truncated += [numbers[i] for i in encoded.truncated]
        return Encoded(rows, sorted(truncated))

    def _by_prompt(self) -> Iterable[tuple[str | None, list[int]]]:
        """The numbers of each prompt's texts."""
        numbers: dict[str | None, list[int]] = {}
        for i, sample in enumerate(self.samples):
            check_text(i, (sample.prompt or "") + sample.text)
            numbers.setdefault(sample.prompt, []).append(i)
        return numbers.items()


@dataclass(frozen=True)
class RerankerTask:
    """Pairs of texts to probabilities.

    Attributes:
        pairs: The pairs.
        log_odds: Whether the model's library, and so the artifact, gives log-odds. They are
            compared as probabilities, which the limits are about.
    """

    pairs: list[Pair]
    log_odds: bool = False
    sense: ClassVar[Sense] = "≤"  # of a difference: less is better

    @property
    def inputs(self) -> list[Pair]:
        """What both sides are given."""
        return self.pairs

    @property
    def names(self) -> list[str]:
        """What the report calls each pair."""
        return [f"pair {i}" for i in range(len(self.pairs))]

    @property
    def texts(self) -> list[str]:
        """What the report shows of each."""
        return [f"{pair.query} | {pair.document}" for pair in self.pairs]

    def artifact_ids(self, reranker: Reranker) -> list[np.ndarray]:
        """Token ids as the artifact makes them."""
        return reranker.tokenizer.encode(self._tuples()).ids

    def run(self, reranker: Reranker, *, progress: bool) -> np.ndarray:
        """The artifact's scores: float32 [pairs]."""
        return reranker.score(self._tuples(), progress=progress)

    def agreement(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """The absolute difference of each score: [n] and [n] to float64 [n]."""
        with np.errstate(invalid="ignore"):  # infinity - infinity
            return np.abs(found.astype(np.float64) - expected)

    def comparable(self, found: np.ndarray) -> np.ndarray:
        """The artifact's scores as probabilities: [pairs]; what is not finite stays."""
        if not self.log_odds:
            return found
        with np.errstate(over="ignore"):
            probabilities = (1 / (1 + np.exp(-found.astype(np.float64)))).astype(np.float32)
        return np.where(np.isfinite(found), probabilities, found)

    def scores(self, found: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the artifact's, the reference's) where both are finite: float64 [pairs]."""
        good = finite_rows(found) & finite_rows(expected)
        return found[good].astype(np.float64), expected[good].astype(np.float64)

    def compare(self, found: np.ndarray, expected: np.ndarray, run: str) -> Comparison:
        """The artifact's scores [pairs] against one run of the reference [pairs]."""
        good = finite_rows(found) & finite_rows(expected)
        return Comparison(
            reference=run,
            reference_nonfinite=int((~finite_rows(expected)).sum()),
            compared=int(good.sum()),
            figures=difference_figures(found[good], expected[good])
            | rank_figures((found[rows], expected[rows]) for rows in self._by_query(good)),
            dimensions={},
        )

    def run_set(self, reranker: Reranker, data: RetrievalSet, *, progress: bool) -> np.ndarray:
        """The artifact's scores of a retrieval set's candidates, [pairs]."""
        return score_set(reranker, data, progress=progress)

    def measure(self, found: np.ndarray, data: RetrievalSet) -> SetQuality:
        """How good the artifact's reranking of a retrieval set is, by what `run_set` gave."""
        return score_quality(found, data)

    def gates(
        self,
        comparison: Comparison,
        found: np.ndarray,
        expected: np.ndarray,
        thresholds: Thresholds,
    ) -> list[Gate]:
        """The gates on the comparison of the artifact's scores with the reference's.

        Args:
            comparison: From `compare`.
            found: float32 [pairs].
            expected: float32 [pairs].
            thresholds: The limits.
        """
        return [
            _score_gate(comparison, thresholds),
            self._order_gate(found, expected, thresholds.tie_margin),
        ]

    def _order_gate(self, found: np.ndarray, expected: np.ndarray, margin: float) -> Gate:
        """How many pairs of one query's documents the artifact puts into another order.

        Documents whose reference scores differ by the margin or less are ties.
        """
        apart, swapped, detail = 0, 0, ""
        for rows in self._by_query(finite_rows(found) & finite_rows(expected)):
            order = rows[np.argsort(-expected[rows], kind="stable")]
            for place, higher in enumerate(order[:-1]):
                lower = order[place + 1 :]
                lower = lower[expected[higher] - expected[lower] > margin]
                wrong = lower[found[lower] >= found[higher]]
                if len(wrong) and not detail:
                    detail = f"pair {wrong[0]} is not below pair {higher}"
                apart += len(lower)
                swapped += len(wrong)
        name = "documents out of order"
        if not apart:
            basis = f"no query has two documents with scores more than {margin:g} apart"
            return Gate(name, None, "≤", 0, basis=basis)
        basis = f"of {apart:,} pairs with scores more than {margin:g} apart"
        return Gate(name, swapped, "≤", 0, detail, basis)

    def _by_query(self, good: np.ndarray) -> list[np.ndarray]:
        """Numbers of the pairs of each query, those that are `good`: bool [pairs]."""
        rows: dict[str, list[int]] = {}
        for i in np.flatnonzero(good):
            rows.setdefault(self.pairs[i].query, []).append(int(i))
        return [np.array(each) for each in rows.values()]

    def invariance_limit(self, thresholds: Thresholds) -> float:
        """The limit for the invariance suite."""
        return thresholds.max_invariance_difference

    def _tuples(self) -> list[tuple[str, str]]:
        return [(pair.query, pair.document) for pair in self.pairs]


def _is_unit(vectors: np.ndarray) -> bool:
    """Whether the finite ones of vectors [n, dim] are of unit length."""
    lengths = np.linalg.norm(vectors[finite_rows(vectors)].astype(np.float64), axis=1)
    return bool((np.abs(lengths - 1) < UNIT).all())


def _length_gate(found: np.ndarray, expected: np.ndarray, thresholds: Thresholds) -> Gate:
    """The vectors' length: 1, or the reference's where it does not normalize."""
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    name, limit = "vectors' length to 1", thresholds.max_length_error
    if not _is_unit(expected):
        name = "vectors' length to the reference's"
        lengths /= np.linalg.norm(expected[:, : found.shape[1]].astype(np.float64), axis=1)
        # What an error that leaves the cosine can do to the length.
        limit = max(limit, (2 * (1 - thresholds.min_cosine)) ** 0.5)
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
) -> EmbeddingTask | RerankerTask:
    """The inputs of an artifact's task: the caller's, or the built-in ones.

    Args:
        task: "embedding" or "reranker".
        texts: The caller's, for an embedding model.
        pairs: The caller's, for a reranker.
        prompts: The names of the model's prompts: each has built-in texts.

    Raises:
        InputError: They are of the other task, or there are none.
    """
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
    if isinstance(texts, str) or not chosen.texts:
        given = pairs if texts is None else texts
        raise InputError(f"give a list of at least one text or pair, found {given!r}")
    return chosen


def _sample(text: str | Sample) -> Sample:
    return text if isinstance(text, Sample) else Sample(text)


def _pair(pair: tuple[str, str] | Pair) -> Pair:
    if isinstance(pair, Pair):
        return pair
    if isinstance(pair, str) or len(pair) != 2:
        raise InputError(f"a pair should be (query, document), found {pair!r}")
    return Pair(*pair)
