"""The smallest assignment of bits to matrices that keeps a target, found by measuring.

First each matrix alone is quantized and its layer run on real texts: what it does to the residual
stream, for the bytes it saves, puts the matrices in order. Then whole models are run, with more and
more matrices given more bits in that order, until the smallest one that keeps the cosine, or the
retrieval quality, is found by bisection. All run with the operators that the artifact will have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...beir import RetrievalSet
from ...errors import InputError
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...ranking import NDCG, measure, rank_candidates, rank_documents
from .formats import TABLE, Format, matrices
from .graph import Design
from .layerwise import Layer, embed_quantized, embed_rows, final_vectors, run_layer
from .precision import Precision, weight_bytes
from .quantized import QuantizedMatrices

# Fewest bytes first; "fp32" is a matrix without a format.
LEVELS = ("int4/64", "int8/128s", "fp32")
# Whole models are run some ten times.
TOKENS = 2048
LONGEST = 512
# Of a retrieval set, run together: their states take 4 KB a token at the 0.6B geometry.
PART_TOKENS = 1 << 17

Quantize = Callable[[str, QuantScheme], QuantizedTensor]


@dataclass(frozen=True)
class Sensitivity:
    """What one matrix, or a whole layer, does to the residual stream behind its layer.

    Attributes:
        name: The matrix, or "layers.3" for all matrices of a layer.
        level: Its format.
        bytes: What it takes.
        error: Sum of the squared differences by the sum of the squares, over all texts' tokens.
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
        rows: Token ids, int64 [tokens] each: the queries' and then the documents', or those of
            `candidate_pairs` for a reranker.
        head: A reranker's row, float32 [hidden, 1]; None for an embedder.
        max_loss: Of nDCG@10.
    """

    data: RetrievalSet
    rows: Sequence[np.ndarray]
    head: np.ndarray | None
    max_loss: float

    def ndcg(self, vectors: np.ndarray) -> float:
        """nDCG@10 of final vectors of `rows`, [rows, hidden]."""
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
        counts: How many matrices had which format.
        bytes: Of its weights.
        min_cosine: Smallest cosine of a text's final state to the fp32 model's.
        ndcg_loss: nDCG@10 of the fp32 model less its own; None without a retrieval set.
    """

    counts: Mapping[str, int]
    bytes: int
    min_cosine: float
    ndcg_loss: float | None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        formats: The choice: matrix to the text of its format.
        min_cosine: What was asked for, if it was.
        max_ndcg_loss: What was asked for, if it was.
        trials: Whole models, in the order in which they were run.
        sensitivities: Of each matrix and layer at each level.
    """

    formats: Mapping[str, str]
    min_cosine: float | None
    max_ndcg_loss: float | None
    trials: Sequence[Trial]
    sensitivities: Sequence[Sensitivity]

    def to_record(self) -> dict[str, Any]:
        """What the manifest keeps beside the recipe."""
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
        quantize: A matrix by its name, and a scheme, to the quantized matrix.
        rows: Token ids of the texts, int64 [tokens] each; whole ones are used up to 2,048 tokens.
        min_cosine: Smallest cosine of a text's final state to that of the fp32 model.
        ranking: Retrieval quality to keep.
        folder: Where a layer's graph may be written while it runs.
        advance: Called after each layer whose matrices were measured.

    Raises:
        InputError: Not even fp32 keeps the target.
    """
    rows = _bounded(rows)
    sensitivities, reference = _measure(design, quantize, rows, folder, advance)
    steps = _order(design, sensitivities)
    best = 0.0 if ranking is None else ranking.ndcg(_run(design, ranking.rows, folder))
    trials: dict[int, Trial] = {}

    def keeps(count: int) -> bool:
        texts = _assign(design, steps[:count])
        trial = _with_formats(design, texts, quantize)
        loss = None if ranking is None else best - ranking.ndcg(_run(trial, ranking.rows, folder))
        trials[count] = Trial(
            dict(Counter(texts.values())),
            weight_bytes(design.spec, trial.precision),
            _min_cosine(_run(trial, rows, folder), reference),
            loss,
        )
        return (min_cosine is None or trials[count].min_cosine >= min_cosine) and (
            ranking is None or loss is None or loss <= ranking.max_loss
        )

    low, high = 0, len(steps)
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
    texts = _assign(design, steps[:high])
    chosen = {name: text for name, text in texts.items() if text != LEVELS[-1]}
    max_loss = None if ranking is None else ranking.max_loss
    return Search(chosen, min_cosine, max_loss, list(trials.values()), sensitivities)


def _bounded(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Whole texts, the last token kept: none too long, all together not too many."""
    chosen, tokens = [], 0
    for row in rows:
        if len(row) <= LONGEST and tokens + len(row) <= TOKENS:
            chosen.append(row)
            tokens += len(row)
    return chosen or [min(rows, key=len)]


def _measure(
    design: Design,
    quantize: Quantize,
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> tuple[list[Sensitivity], np.ndarray]:
    """The sensitivities, and the fp32 model's final vectors."""
    found = []
    states = embed_rows(design.weights, rows)
    names = matrices(design.spec)
    for level in LEVELS[:-1]:
        trial = _with_formats(design, {TABLE: level}, quantize)
        error = _error(embed_quantized(trial, rows, folder), states)
        found.append(Sensitivity(TABLE, level, _bytes(design, {TABLE: level}), error))
    for number in range(design.spec.num_layers):
        prefix = f"layers.{number}."
        inside = [name for name in names if name.startswith(prefix)]
        expected = _run_layer(design, number, rows, states, folder)
        for level in LEVELS[:-1]:
            for part in (*([name] for name in inside), inside):
                texts = dict.fromkeys(part, level)
                trial = _with_formats(design, texts, quantize)
                out = _run_layer(trial, number, rows, states, folder)
                name = part[0] if len(part) == 1 else prefix.rstrip(".")
                found.append(Sensitivity(name, level, _bytes(design, texts), _error(out, expected)))
        states = expected
        advance()
    return found, final_vectors(design, states)


def _order(design: Design, sensitivities: Sequence[Sensitivity]) -> list[tuple[str, str]]:
    """(matrix, its next level), the most error taken away for a byte first."""
    by_name: dict[str, dict[str, Sensitivity]] = {}
    names = {TABLE, *matrices(design.spec)}
    for each in sensitivities:
        if each.name in names:
            by_name.setdefault(each.name, {})[each.level] = each
    gains = []
    for name, levels in by_name.items():
        whole = Sensitivity(name, LEVELS[-1], _bytes(design, {name: LEVELS[-1]}), 0.0)
        chain = [levels[LEVELS[0]], levels[LEVELS[1]], whole]
        last = np.inf
        for before, after in pairwise(chain):
            gain = (before.error - after.error) / (after.bytes - before.bytes)
            last = min(last, gain)  # a matrix goes through its levels in order
            gains.append((last, name, after.level))
    gains.sort(key=lambda each: -each[0])
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
    found = QuantizedMatrices(lambda name: quantize(name, precision.formats[name].scheme))
    return replace(design, precision=precision, matrices=found)


def _bytes(design: Design, texts: Mapping[str, str]) -> int:
    """What some matrices take: the whole model's weights less all the others'."""
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


def _run(design: Design, rows: Sequence[np.ndarray], folder: Path) -> np.ndarray:
    """Final vectors of a whole model, some texts after others: a retrieval set may be large."""
    found = []
    for part in _parts(rows):
        table = TABLE in design.precision.formats
        states = (
            embed_quantized(design, part, folder) if table else embed_rows(design.weights, part)
        )
        for number in range(design.spec.num_layers):
            with Layer(design, number, folder) as layer:
                run_layer(layer, part, states)
        found.append(final_vectors(design, states))
    return np.concatenate(found)


def _parts(rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Texts in their order, `PART_TOKENS` together at most, where one alone has no more."""
    parts: list[list[np.ndarray]] = [[]]
    tokens = 0
    for row in rows:
        if parts[-1] and tokens + len(row) > PART_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += len(row)
    return parts


def _error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, expected, strict=True))
    return difference / sum(float((each**2).sum()) for each in expected)


def _min_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found * expected).sum(axis=1) / lengths
    return float(np.nan_to_num(cosines, nan=-1.0).min())
