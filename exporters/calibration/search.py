"""Find the smallest assignment of bits to matrices that keeps a quality target.

1. Measure: quantize each matrix alone and run its layer on real texts. The score is the relative
   error of the residual stream: larger is worse.
2. Order: sort the upgrades to more bits by the error they remove per byte.
3. Choose: find by bisection the fewest upgrades with which the whole model keeps the cosine, the
   retrieval quality, or both.

All steps run the operators that the artifact will have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...quantize.formats import TABLE, Format, matrices
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...texts.beir import RetrievalSet
from ...texts.ranking import NDCG, measure, rank_candidates, rank_documents
from ..graph.initializers import QuantizedMatrices
from ..graph.precision import Precision, weight_bytes
from ..graph.qwen3 import Design
from .layerwise import Layer, embed_quantized, embed_rows, final_vectors, run_layer

# Fewest bytes first; "fp32" is a matrix without a format.
LEVELS = ("int4/64", "int8/128s", "fp32")
# Limits of the texts to measure on: whole models run about ten times.
TOKENS = 2048
LONGEST = 512
# Tokens of a retrieval set to run together: states take 4 KB per token of the 0.6B model.
PART_TOKENS = 1 << 17

Quantize = Callable[[str, QuantScheme], QuantizedTensor]


@dataclass(frozen=True)
class Sensitivity:
    """The error that one quantized matrix, or layer, causes in the residual stream after its layer.

    Attributes:
        name: The matrix, or "layers.3" for all matrices of a layer.
        level: Its format.
        bytes: Its size in that format.
        error: Sum of squared differences / sum of squares, over all texts' tokens; larger is worse.
    """

    name: str
    level: str
    bytes: int
    error: float


@dataclass(frozen=True)
class RankingTarget:
    """How much retrieval quality a model may lose.

    Attributes:
        data: The retrieval set.
        rows: Token ids, int64 [tokens] each: queries, then documents; for a reranker, those of
            `candidate_pairs`.
        head: A reranker's head, float32 [hidden, 1]; None for an embedder.
        max_loss: The largest allowed loss of nDCG@10.
    """

    data: RetrievalSet
    rows: Sequence[np.ndarray]
    head: np.ndarray | None
    max_loss: float

    def ndcg(self, vectors: np.ndarray) -> float:
        """nDCG@10 of the final vectors of `rows`, [rows, hidden]."""
        if self.head is not None:
            scores = np.nan_to_num(vectors @ self.head)[:, 0]
            ranking = rank_candidates(
                {query: self.data.candidates[query] for query in self.data.queries}, scores
            )
        else:
            parts = np.split(vectors, [len(self.data.queries)])
            ranking = rank_documents((parts[0], parts[1]), vectors.shape[1], self.data)
        return float(measure(ranking, self.data.relevance, (NDCG,))[NDCG].mean())


@dataclass(frozen=True)
class Trial:
    """A whole model that was run.

    Attributes:
        counts: The number of matrices in each format.
        bytes: The size of its weights.
        min_cosine: Smallest cosine of a text's final state to the fp32 model's.
        ndcg_loss: nDCG@10 of the fp32 model less its own; None without a retrieval set.
    """

    counts: Mapping[str, int]
    bytes: int
    min_cosine: float
    ndcg_loss: float | None


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        formats: The chosen formats: matrix to the text of its format.
        min_cosine: The target for the cosine, if any.
        max_ndcg_loss: The target for the loss of nDCG@10, if any.
        trials: Whole models, in the order in which they were run.
        sensitivities: Each matrix and layer at each level.
    """

    formats: Mapping[str, str]
    min_cosine: float | None
    max_ndcg_loss: float | None
    trials: Sequence[Trial]
    sensitivities: Sequence[Sensitivity]

    def to_record(self) -> dict[str, Any]:
        """The manifest's record beside the recipe."""
        record = asdict(self)
        del record["formats"]
        return record


def search_formats(
    design: Design,
    quantize: Quantize,
    rows: Sequence[np.ndarray],
    min_cosine: float | None,
    ranking: RankingTarget | None,
    folder: Path,
    advance: Callable[[], None],
) -> Search:
    """Find the smallest assignment that keeps a cosine, retrieval quality, or both.

    Args:
        design: The model in fp32, in the `ort` dialect.
        quantize: A function from a matrix's name and a scheme to the quantized matrix.
        rows: Token ids of the texts, int64 [tokens] each; whole texts are used, 2,048 tokens in
            all.
        min_cosine: Smallest cosine of a text's final state to that of the fp32 model.
        ranking: Retrieval quality to keep.
        folder: Where a layer's graph may be written while it runs.
        advance: Called after each layer whose matrices were measured.

    Raises:
        InputError: Not even fp32 keeps the target.
    """
    rows = _select_texts(rows)
    sensitivities, reference = _measure_matrices(design, quantize, rows, folder, advance)
    upgrades = _sort_upgrades(design, sensitivities)
    fp32_ndcg = 0.0 if ranking is None else ranking.ndcg(_run_model(design, ranking.rows, folder))
    trials: dict[int, Trial] = {}

    def keeps(count: int) -> bool:
        texts = _assign(design, upgrades[:count])
        trial = _with_formats(design, texts, quantize)
        loss = (
            None
            if ranking is None
            else fp32_ndcg - ranking.ndcg(_run_model(trial, ranking.rows, folder))
        )
        trials[count] = Trial(
            dict(Counter(texts.values())),
            weight_bytes(design.spec, trial.precision),
            _min_cosine(_run_model(trial, rows, folder), reference),
            loss,
        )
        return (min_cosine is None or trials[count].min_cosine >= min_cosine) and (
            ranking is None or loss is None or loss <= ranking.max_loss
        )

    low, high = 0, len(upgrades)
    while low < high:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle + 1
    if high not in trials and not keeps(high):
        raise InputError(
            f"no assignment keeps the target: fp32 itself gives a cosine of "
            f"{trials[high].min_cosine:.7f} and loses {trials[high].ndcg_loss or 0:.7f} of nDCG@10"
        )
    texts = _assign(design, upgrades[:high])
    chosen = {name: text for name, text in texts.items() if text != LEVELS[-1]}
    max_loss = None if ranking is None else ranking.max_loss
    return Search(chosen, min_cosine, max_loss, list(trials.values()), sensitivities)


def _select_texts(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Whole texts, so that last tokens stay last: each within `LONGEST`, all within `TOKENS`."""
    chosen, tokens = [], 0
    for row in rows:
        if len(row) <= LONGEST and tokens + len(row) <= TOKENS:
            chosen.append(row)
            tokens += len(row)
    return chosen or [min(rows, key=len)]


def _measure_matrices(
    design: Design,
    quantize: Quantize,
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> tuple[list[Sensitivity], np.ndarray]:
    """The sensitivities, and the fp32 model's final vectors."""
    sensitivities = []
    states = embed_rows(design.weights, rows)
    names = matrices(design.spec)
    for level in LEVELS[:-1]:
        trial = _with_formats(design, {TABLE: level}, quantize)
        error = _relative_error(embed_quantized(trial, rows, folder), states)
        sensitivities.append(Sensitivity(TABLE, level, _size_of(design, {TABLE: level}), error))
    for number in range(design.spec.num_layers):
        prefix = f"layers.{number}."
        matrices_of_layer = [name for name in names if name.startswith(prefix)]
        expected = _run_layer(design, number, rows, states, folder)
        for level in LEVELS[:-1]:
            for part in (*([name] for name in matrices_of_layer), matrices_of_layer):
                texts = dict.fromkeys(part, level)
                trial = _with_formats(design, texts, quantize)
                out = _run_layer(trial, number, rows, states, folder)
                name = part[0] if len(part) == 1 else prefix.rstrip(".")
                sensitivities.append(
                    Sensitivity(
                        name, level, _size_of(design, texts), _relative_error(out, expected)
                    )
                )
        states = expected
        advance()
    return sensitivities, final_vectors(design, states)


def _sort_upgrades(design: Design, sensitivities: Sequence[Sensitivity]) -> list[tuple[str, str]]:
    """Upgrades (matrix, its next level), sorted by the error removed per byte, most first."""
    by_name: dict[str, dict[str, Sensitivity]] = {}
    names = {TABLE, *matrices(design.spec)}
    for sensitivity in sensitivities:
        if sensitivity.name in names:
            by_name.setdefault(sensitivity.name, {})[sensitivity.level] = sensitivity
    gains = []
    for name, levels in by_name.items():
        whole = Sensitivity(name, LEVELS[-1], _size_of(design, {name: LEVELS[-1]}), 0.0)
        chain = [levels[LEVELS[0]], levels[LEVELS[1]], whole]
        last = np.inf
        for before, after in pairwise(chain):
            gain = (before.error - after.error) / (after.bytes - before.bytes)
            last = min(last, gain)  # a matrix is upgraded level by level
            gains.append((last, name, after.level))
    gains.sort(key=lambda gain: -gain[0])
    return [(name, level) for _, name, level in gains]


def _assign(design: Design, steps: Sequence[tuple[str, str]]) -> dict[str, str]:
    texts = dict.fromkeys((TABLE, *matrices(design.spec)), LEVELS[0])
    for name, level in steps:
        texts[name] = level
    return texts


def _precision(design: Design, texts: Mapping[str, str]) -> Precision:
    formats = {name: Format.parse(text) for name, text in texts.items() if text != LEVELS[-1]}
    return replace(design.precision, formats=formats)


def _with_formats(design: Design, texts: Mapping[str, str], quantize: Quantize) -> Design:
    precision = _precision(design, texts)
    quantized = QuantizedMatrices(lambda name: quantize(name, precision.formats[name].scheme))
    return replace(design, precision=precision, matrices=quantized)


def _size_of(design: Design, texts: Mapping[str, str]) -> int:
    """The size of some matrices: the whole model's weights less all the others'."""
    spec = design.spec
    rest = sum(
        4 * int(np.prod(shape))
        for name, shape in spec.tensor_shapes().items()
        if name != "lm_head.weight" and name.removesuffix(".weight") not in texts
    )
    return weight_bytes(spec, _precision(design, texts)) - rest


def _run_layer(
    design: Design,
    number: int,
    rows: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    folder: Path,
) -> list[np.ndarray]:
    after = list(states)
    with Layer(design, number, folder) as layer:
        run_layer(layer, rows, after)
    return after


def _run_model(design: Design, rows: Sequence[np.ndarray], folder: Path) -> np.ndarray:
    """Final vectors of a whole model, some texts at a time: a retrieval set may be large."""
    vectors = []
    for part in _split_texts(rows):
        table = TABLE in design.precision.formats
        states = (
            embed_quantized(design, part, folder) if table else embed_rows(design.weights, part)
        )
        for number in range(design.spec.num_layers):
            with Layer(design, number, folder) as layer:
                run_layer(layer, part, states)
        vectors.append(final_vectors(design, states))
    return np.concatenate(vectors)


def _split_texts(rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Texts in order, in parts of at most `PART_TOKENS`; a longer text is a part of its own."""
    parts: list[list[np.ndarray]] = [[]]
    tokens = 0
    for row in rows:
        if parts[-1] and tokens + len(row) > PART_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += len(row)
    return parts


def _relative_error(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(actual, expected, strict=True))
    return difference / sum(float((states**2).sum()) for states in expected)


def _min_cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / lengths
    return float(np.nan_to_num(cosines, nan=-1.0).min())
