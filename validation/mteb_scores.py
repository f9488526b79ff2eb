"""Scores on MTEB's tasks: results by query or pair, and the interval of a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import require
from .retrieval import RESAMPLES, interval

# Values that are resampled at a time.
CHUNK = 2_000_000


@dataclass(frozen=True)
class TaskFacts:
    """A task of MTEB.

    Attributes:
        task: Its name.
        type: Its type, such as "Retrieval".
        measure: Its main score, as mteb names it.
        dataset: Hub id of its data set.
        revision: The data set's revision.
    """

    task: str
    type: str
    measure: str
    dataset: str
    revision: str


@dataclass(frozen=True)
class TaskRow(TaskFacts):
    """A task's score of the artifact and of the reference.

    Attributes:
        samples: Number of queries or pairs behind the interval; None without an interval.
        artifact: The artifact's score, the mean over the task's subsets.
        reference: The reference's score.
        difference: Artifact minus reference.
        low: Lower end of the difference's 95 % bootstrap interval; None if the task gives no
            results by query or pair.
        high: Upper end of the interval.
    """

    samples: int | None
    artifact: float
    reference: float
    difference: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "none: one score"
        return f"{self.low:+.4f} to {self.high:+.4f}"


@dataclass(frozen=True)
class TaskReport:
    """Scores on MTEB's tasks.

    Attributes:
        version: mteb's version.
        reference: The reference run's arithmetic and device.
        rows: A row for each task.
    """

    version: str
    reference: str
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True)
class Samples:
    """The results of one subset of a task.

    Attributes:
        values: The measure of each query, or the similarity of each pair: float64 [samples].
        gold: The similarity that people gave each pair, float64 [samples]; None for queries.
        ranked: Whether only the order of the similarities counts.
    """

    values: np.ndarray
    gold: np.ndarray | None = None
    ranked: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def score(self) -> float:
        """The subset's score."""
        return float(self.resampled(np.arange(len(self))[None])[0])

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The subset's score on resamples: int64 [resamples, samples] to float64 [resamples].

        It is the mean over queries, or the correlation with `gold`: Pearson's, or Spearman's, which
        gives equal values their mean rank.
        """
        values = self.values[indices]
        if self.gold is None:
            return values.mean(axis=1)
        gold = self.gold[indices]
        if self.ranked:
            rankdata = require("scipy.stats", "mteb").rankdata
            values, gold = rankdata(values, axis=1), rankdata(gold, axis=1)
        values = values - values.mean(axis=1, keepdims=True)
        gold = gold - gold.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):  # equal values have no correlation
            return (values * gold).sum(1) / np.sqrt((values**2).sum(1) * (gold**2).sum(1))


@dataclass(frozen=True)
class TaskScore:
    """One model's result of a task.

    Attributes:
        score: The main score that mteb computed.
        subsets: Split and subset to the results by query or pair; empty if the task gives none.
        nonfinite: Number of vectors or scores with NaN or infinity, which count as 0.
    """

    score: float
    subsets: Mapping[tuple[str, str], Samples]
    nonfinite: int


def compare_scores(
    facts: Sequence[TaskFacts],
    artifact: Sequence[TaskScore],
    reference: Sequence[TaskScore],
    *,
    version: str,
    run: str,
) -> TaskReport:
    """Compare the artifact's scores with the reference's.

    Args:
        facts: The tasks.
        artifact: The artifact's result of each.
        reference: The reference's.
        version: mteb's version.
        run: The name of the reference's run.
    """
    rows = []
    for task, score, expected in zip(facts, artifact, reference, strict=True):
        low, high = task_interval(score.subsets, expected.subsets) or (None, None)
        rows.append(
            TaskRow(
                **vars(task),
                samples=None if low is None else sum(map(len, score.subsets.values())),
                artifact=score.score,
                reference=expected.score,
                difference=score.score - expected.score,
                low=low,
                high=high,
            )
        )
    return TaskReport(version, run, tuple(rows))


def task_interval(
    artifact: Mapping[tuple[str, str], Samples], reference: Mapping[tuple[str, str], Samples]
) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the difference of a task's scores, seeded.

    Each subset's queries or pairs are resampled, the same ones on both sides, and the subsets'
    scores averaged.

    Args:
        artifact: The artifact's results by split and subset.
        reference: The reference's.

    Returns:
        (low, high), or None if there are no results by query or pair, or not the same ones.
    """
    sizes, expected = (
        {key: len(samples) for key, samples in side.items()} for side in (artifact, reference)
    )
    if not sizes or sizes != expected:
        return None
    generator = np.random.default_rng(0)
    differences = np.zeros(RESAMPLES)
    for key, samples in artifact.items():
        count = len(samples)
        step = max(1, CHUNK // count)
        for start in range(0, RESAMPLES, step):
            part = slice(start, min(start + step, RESAMPLES))
            indices = generator.integers(0, count, (part.stop - part.start, count))
            differences[part] += samples.resampled(indices) - reference[key].resampled(indices)
    differences = differences[np.isfinite(differences)] / len(artifact)
    return interval(differences) if len(differences) else None
