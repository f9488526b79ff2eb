"""Choose a format for each matrix: the smallest model that keeps a quality, or the best in a size.

1. Measure: quantize each matrix alone to 4 bits and run the model. The matrix's error is what that
   does to the final vectors: 1 - cosine, on average over texts.
2. Predict: every other format's error is a part of that one. Errors of matrices add up.
3. Choose: within a size, the formats with the least sum of errors. For a quality, order upgrades
   by the error that they remove per byte, and find the fewest with which whole models keep it,
   quantized by the algorithm of the result. If that runs texts, trials are calibrated on three
   texts of four, and judged by the others.

All steps run the operators that the artifact will have.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.spec import ModelSpec
from ...errors import InputError
from ...quantize.formats import TABLE, Format, matrices, quantized_bytes, splits_a_byte
from ...quantize.recipe import Recipe
from ...quantize.rtn import quantize_rtn
from ...quantize.schemes import QuantizedTensor
from ...quantize.source import quantize_rows
from ...texts.beir import RetrievalSet
from ...texts.ranking import NDCG, measure, rank_candidates, rank_documents
from ..graph.initializers import QuantizedMatrices
from ..graph.precision import Precision, weight_bytes
from ..graph.qwen3 import Design
from .choice import Level, Upgrade, choose_within, sort_upgrades
from .layerwise import Layer, embed_quantized, embed_rows, final_vectors
from .moments import blocks

# Fewest bytes first; "fp32" is a matrix without a format.
FP32 = "fp32"
LEVELS = ("int4/128", "int4/32", "int8/128s", FP32)
TABLE_LEVELS = ("int4/64", "int4/32", "int8/128s", FP32)
# The error of each level, relative to groups of 128 in 4 bits. A group's largest value sets its
# step, and is smaller where the group is: measured by GPTAQ at three widths, docs/quantization.md.
# Eight bits have a sixteenth of the step.
ERRORS = {"int4/128": 1, "int4/64": 0.82, "int4/32": 0.66, "int8/128s": 1 / 256, FP32: 0}
# Every how many texts one judges trials, and the others calibrate them.
JUDGES = 4
# Tokens to judge trials by, and the longest text among them.
TOKENS = 2048
LONGEST = 512
# Tokens to measure matrices by. The states of all models with one quantized matrix are held at
# once: at most this many values.
MEASURED_TOKENS = 512
MEASURED_VALUES = 1 << 27
# Whole models that are run at most once one of them keeps the quality.
TRIALS = 8
# Tokens of a retrieval set to run together, about: states take 4 KB per token of the 0.6B model.
PART_TOKENS = 1 << 17

# (formats' texts by matrix, calibration texts' token ids, folder) to the quantized model.
Apply = Callable[[Mapping[str, str], Sequence[np.ndarray], Path], Design]


@dataclass(frozen=True)
class Sensitivity:
    """The error that one matrix in 4 bits causes in the final vectors.

    Attributes:
        name: The matrix.
        level: Its format.
        bytes: Its size in that format.
        error: 1 - cosine to the fp32 model's vectors, on average over texts.
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
        max_loss: The largest allowed loss of nDCG@10.
        head: A reranker's head, float32 [hidden, 1]; None for an embedder, and until the weights
            are read.
    """

    data: RetrievalSet
    rows: Sequence[np.ndarray]
    max_loss: float
    head: np.ndarray | None = None

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
class Target:
    """The quality or size that a search keeps.

    Attributes:
        min_cosine: The smallest allowed cosine of a text's vector to that of the fp32 model; None
            if only retrieval or the size counts.
        ranking: Retrieval quality to keep.
        max_bytes: The most bytes of the graph's weights, no fewer than `smallest_bytes`.
        recipe: The algorithm and rotation that the result will have, still without formats. If it
            is calibrated, texts that judge trials do not calibrate them.
    """

    min_cosine: float | None
    ranking: RankingTarget | None
    max_bytes: int | None
    recipe: Recipe


@dataclass(frozen=True)
class Trial:
    """A whole model that was run.

    Attributes:
        counts: The number of matrices in each format.
        bytes: The size of its weights.
        min_cosine: Smallest cosine of a text's vector to the fp32 model's.
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
        bytes: The size of the weights.
        min_cosine: The target for the cosine, if any.
        max_ndcg_loss: The target for the loss of nDCG@10, if any.
        max_bytes: The target for the size, if any.
        trials: Whole models, in the order in which they were run.
        sensitivities: Each matrix in 4 bits.
    """

    formats: Mapping[str, str]
    bytes: int
    min_cosine: float | None
    max_ndcg_loss: float | None
    max_bytes: int | None
    trials: Sequence[Trial]
    sensitivities: Sequence[Sensitivity]

    def to_record(self) -> dict[str, Any]:
        """The manifest's record beside the recipe."""
        record = asdict(self)
        del record["formats"]
        return record


def search_formats(
    design: Design,
    apply: Apply,
    rows: Sequence[np.ndarray],
    target: Target,
    folder: Path,
    advance: Callable[[], None],
) -> Search:
    """Find the smallest assignment that keeps a quality, or the best one within a size.

    Args:
        design: The model in fp32, in the `ort` dialect.
        apply: A function that quantizes whole models, by the algorithm of the result.
        rows: Token ids of the texts, int64 [tokens] each.
        target: What to keep.
        folder: Where graphs may be written while they run.
        advance: Called after each layer whose matrices were measured.

    Raises:
        InputError: Not even fp32 keeps the quality, or what keeps it exceeds the size.
    """
    measured = _select_texts(rows, _measured_tokens(design))
    sensitivities = _measure_matrices(design, measured, folder, advance)
    options = {matrix.name: _predict(design, matrix) for matrix in sensitivities}
    smallest = smallest_bytes(design.spec, design.precision, target.recipe)
    trials: list[Trial] = []
    if target.min_cosine is None and target.ranking is None:
        assert target.max_bytes is not None
        texts = choose_within(options, target.max_bytes - smallest)
    else:
        upgrades = sort_upgrades(options)
        judge = _Judge(design, apply, rows, target, folder)
        errors = sum(levels[0].error for levels in options.values()) - np.cumsum(
            [0.0, *(upgrade.gain for upgrade in upgrades)]
        )
        count = _fewest(np.maximum(errors, 0), target.min_cosine, judge, upgrades)
        texts = _assign(design.spec, upgrades[:count])
        trials = list(judge.trials.values())
    size = _bytes_of(design.spec, design.precision, texts, rotates=target.recipe.rotate)
    if target.max_bytes is not None and size > target.max_bytes:
        raise InputError(
            f"what keeps the quality takes {size:,} bytes, and {target.max_bytes:,} are allowed; "
            "allow more bytes or a lower quality"
        )
    return Search(
        {name: text for name, text in texts.items() if text != FP32},
        size,
        target.min_cosine,
        None if target.ranking is None else target.ranking.max_loss,
        target.max_bytes,
        trials,
        sensitivities,
    )


def smallest_bytes(spec: ModelSpec, precision: Precision, recipe: Recipe) -> int:
    """The bytes of the smallest model that a search can choose.

    Args:
        spec: The model.
        precision: The precision of what is not quantized.
        recipe: The algorithm and rotation that the result will have.
    """
    return _bytes_of(spec, precision, _assign(spec, []), rotates=recipe.rotate)


class _Judge:
    """Runs whole models, and says whether they keep the quality."""

    def __init__(
        self,
        design: Design,
        apply: Apply,
        rows: Sequence[np.ndarray],
        target: Target,
        folder: Path,
    ) -> None:
        self._design, self._apply, self._target, self._folder = design, apply, target, folder
        self._calibration, judges = rows, rows
        if target.recipe.is_calibrated and len(rows) > 1:
            self._calibration = [row for i, row in enumerate(rows) if i % JUDGES]
            judges = rows[::JUDGES]
        self._rows = _select_texts(judges, TOKENS)
        self._expected = _run_model(design, self._rows, folder)
        self._ndcg = 0.0
        if target.ranking is not None:
            self._ndcg = target.ranking.ndcg(_run_model(design, target.ranking.rows, folder))
        self.trials: dict[int, Trial] = {}

    def keeps(self, upgrades: Sequence[Upgrade]) -> bool:
        """Quantize and run a model with the first upgrades; record the trial."""
        texts = _assign(self._design.spec, upgrades)
        ranking, loss = self._target.ranking, 0.0
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            model = self._apply(texts, self._calibration, Path(folder))
            vectors = _run_model(model, self._rows, self._folder)
            cosine = float(_cosines(vectors, self._expected).min())
            if ranking is not None:
                loss = self._ndcg - ranking.ndcg(_run_model(model, ranking.rows, self._folder))
        size = _bytes_of(
            self._design.spec,
            self._design.precision,
            texts,
            rotates=self._target.recipe.rotate,
        )
        self.trials[len(upgrades)] = Trial(
            dict(Counter(texts.values())), size, cosine, None if ranking is None else loss
        )
        least = self._target.min_cosine
        return (least is None or cosine >= least) and (ranking is None or loss <= ranking.max_loss)


def _fewest(
    errors: np.ndarray, min_cosine: float | None, judge: _Judge, upgrades: Sequence[Upgrade]
) -> int:
    """Find the fewest upgrades that keep the quality, by bisection guided by predicted errors.

    Args:
        errors: float64 [upgrades + 1], the error predicted after each number of upgrades.
        min_cosine: The target, to which predictions are scaled; None to bisect by number.
        judge: Runs the models.
        upgrades: In their order.

    Raises:
        InputError: Not even all upgrades keep it.
    """
    low, high, kept = 0, len(upgrades), False
    ratio = 1.0
    while low < high and not (kept and len(judge.trials) >= TRIALS):
        middle = (low + high) // 2
        if min_cosine is not None and len(judge.trials) < TRIALS // 2:
            allowed = (1 - min_cosine) / ratio
            guess = int(np.argmax(errors <= allowed)) if errors[-1] <= allowed else high
            middle = min(max(guess, low), high - 1)
        if judge.keeps(upgrades[:middle]):
            high, kept = middle, True
        else:
            low = middle + 1
        error = 1 - judge.trials[middle].min_cosine
        if errors[middle] > 0 and error > 0:
            ratio = error / float(errors[middle])
    if high not in judge.trials and not judge.keeps(upgrades[:high]):
        raise InputError(
            f"no assignment keeps the target: fp32 itself gives a cosine of "
            f"{judge.trials[high].min_cosine:.7f} and loses "
            f"{judge.trials[high].ndcg_loss or 0:.7f} of nDCG@10"
        )
    return high


def _measured_tokens(design: Design) -> int:
    models = len(matrices(design.spec)) + 2
    return min(MEASURED_TOKENS, MEASURED_VALUES // (models * design.spec.hidden_size))


def _select_texts(rows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Whole texts, so that last tokens stay last: each within `LONGEST`, all within `tokens`.

    Where none is that short, it is the end of the shortest.
    """
    chosen: list[np.ndarray] = []
    for row in rows:
        if len(row) <= min(LONGEST, tokens - sum(map(len, chosen))):
            chosen.append(row)
    return chosen or [min(rows, key=len)[-min(LONGEST, tokens) :]]


def _measure_matrices(
    design: Design,
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> list[Sensitivity]:
    """Run the fp32 model and, at the same time, one model for each matrix in 4 bits."""
    names = [TABLE]
    states = embed_rows(design.weights, rows)
    first = _assign(design.spec, [])
    table = states
    if first[TABLE] != FP32:
        trial = _with_format(design, TABLE, first[TABLE])
        table = embed_quantized(trial, rows, folder)
    # For each text the states of all models, the fp32 one first: [models, tokens, hidden_size].
    models = [np.empty((len(first) + 1, *state.shape[1:]), np.float32) for state in states]
    for all_states, *both in zip(models, states, table, strict=True):
        all_states[:2] = np.concatenate(both)
    for number in range(design.spec.num_layers):
        before = [states[:1].copy() for states in models]
        with Layer(design, number, folder) as layer:
            for ids, all_states in zip(rows, models, strict=True):
                states_so_far = all_states[: len(names) + 1]
                states_so_far[:] = layer.run(ids, states_so_far)
        for name in matrices(design.spec):
            if not name.startswith(f"layers.{number}."):
                continue
            names.append(name)
            trial = _with_format(design, name, first[name])
            with Layer(trial, number, folder) as layer:
                for ids, all_states, state in zip(rows, models, before, strict=True):
                    all_states[len(names)] = layer.run(ids, state)[0]
        advance()
    vectors = [
        final_vectors(design, [states[i : i + 1] for states in models])
        for i in range(len(names) + 1)
    ]
    return [
        Sensitivity(
            name,
            first[name],
            _size(design.spec, name, first[name]),
            max(0.0, 1 - float(_cosines(changed, vectors[0]).mean())),
        )
        for name, changed in zip(names, vectors[1:], strict=True)
    ]


def _predict(design: Design, matrix: Sensitivity) -> list[Level]:
    """The error of each of a matrix's levels, by that of its first, which was measured."""
    levels = _levels(design.spec, matrix.name)
    # Of a few inputs nothing is smaller than fp32, which has no error to predict from.
    error = matrix.error / (ERRORS[levels[0]] or 1)
    return [
        Level(level, _size(design.spec, matrix.name, level), error * ERRORS[level])
        for level in levels
    ]


def _levels(spec: ModelSpec, name: str) -> list[str]:
    """A matrix's levels, without those that take as many bytes as one with less error.

    Smaller groups take fewer bytes where the larger ones would be filled up with padding.
    """
    levels: list[str] = []
    for level in reversed(TABLE_LEVELS if name == TABLE else LEVELS):
        if name == TABLE and level != FP32 and splits_a_byte(spec, Format.parse(level)):
            continue
        if not levels or _size(spec, name, level) < _size(spec, name, levels[0]):
            levels.insert(0, level)
    return levels


def _assign(spec: ModelSpec, upgrades: Sequence[Upgrade]) -> dict[str, str]:
    texts = {name: _levels(spec, name)[0] for name in (TABLE, *matrices(spec))}
    return texts | {upgrade.name: upgrade.level for upgrade in upgrades}


def _size(spec: ModelSpec, name: str, level: str) -> int:
    shape = spec.tensor_shapes()[f"{name}.weight"]
    if level == FP32:
        return 4 * math.prod(shape)
    return quantized_bytes(Format.parse(level), (shape[0], shape[1]))


def _bytes_of(
    spec: ModelSpec, precision: Precision, texts: Mapping[str, str], *, rotates: bool
) -> int:
    return weight_bytes(spec, replace(precision, formats=_parse(texts)), rotates=rotates)


def _with_format(design: Design, name: str, text: str) -> Design:
    """The model with one matrix rounded to nearest."""
    formats = _parse({name: text})

    def quantize(name: str) -> QuantizedTensor:
        return quantize_rows(design.weights, name, formats[name].scheme, quantize_rtn)

    precision = replace(design.precision, formats=formats)
    return replace(design, precision=precision, matrices=QuantizedMatrices(quantize))


def _parse(texts: Mapping[str, str]) -> dict[str, Format]:
    return {name: Format.parse(text) for name, text in texts.items() if text != FP32}


def _run_model(design: Design, rows: Sequence[np.ndarray], folder: Path) -> np.ndarray:
    """Final vectors of a whole model, some texts at a time: a retrieval set may be large."""
    vectors = []
    for block in blocks(rows, PART_TOKENS):
        part = [rows[i] for i in block]
        if TABLE in design.precision.formats:
            states = embed_quantized(design, part, folder)
        else:
            states = embed_rows(design.weights, part)
        for number in range(design.spec.num_layers):
            with Layer(design, number, folder) as layer:
                for i, ids in enumerate(part):  # in place: states may be gigabytes
                    states[i] = layer.run(ids, states[i])
        vectors.append(final_vectors(design, states))
    return np.concatenate(vectors)


def _cosines(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    return np.nan_to_num((actual * expected).sum(axis=1) / lengths, nan=-1.0)
