"""Compare an artifact's results with its reference's: the gates, and what the report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError
from ..runtimes import ModelInfo
from ..texts.beir import RetrievalSet
from .gates import finite_gate, invariance_gate, retrieval_gates, task_gates
from .graphs import Few, run_few
from .invariance import run_suite
from .measures import finite_rows
from .mteb_scores import TaskReport, TaskScore, compare_scores
from .mteb_tasks import run_tasks, runner, task_facts
from .reference import Arithmetic, Inputs, Reference
from .report import Comparison, Gate, Worst, excerpt
from .retrieval import RetrievalReport, compare_quality
from .tasks import AnyTask
from .thresholds import Thresholds

Results = TypeVar("Results")
# Inputs that the report lists.
WORST = 10


@dataclass(frozen=True)
class Measured:
    """The artifact's results.

    Attributes:
        raw: As the artifact gives them: vectors, float32 [texts, dim], or scores, float32 [pairs].
        results: The same, made comparable with the reference's.
        set_results: Those of the retrieval set; None without one.
        task_scores: Its scores on MTEB's tasks.
        invariance: Case of the invariance suite to the worst agreement with the text alone.
        few: Those of a few inputs alone, for comparison with other software; None for a checkpoint.
    """

    raw: np.ndarray
    results: np.ndarray
    set_results: Any
    task_scores: list[TaskScore]
    invariance: dict[str, float]
    few: Few | None


@dataclass(frozen=True)
class Judged:
    """Both sides compared; all but the gates is empty if the token ids differ.

    Attributes:
        gates: In the order in which they are checked.
        comparisons: One for each run of the reference; the gates use the first.
        invariance: As in `Measured`.
        worst: The inputs farthest from the reference, the worst first.
        retrieval: Quality on the retrieval set, if there is one.
        mteb: Scores on MTEB's tasks, if there are any.
        results: The artifact's comparable results.
        expected: Those of the reference's run that the gates use.
    """

    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...] = ()
    invariance: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[Worst, ...] = ()
    retrieval: RetrievalReport | None = None
    mteb: TaskReport | None = None
    results: np.ndarray | None = None
    expected: np.ndarray | None = None


def measure_artifact(
    runtime: Any,
    inputs: AnyTask,
    rows: list[np.ndarray],
    data: RetrievalSet | None,
    tasks: Sequence[Any],
    *,
    progress: bool,
) -> Measured:
    """Run the artifact on everything that is compared.

    Args:
        runtime: The `Embedder` or `Reranker`.
        inputs: The texts or pairs.
        rows: Their token ids, int64 [tokens] each.
        data: The retrieval set; None without one.
        tasks: MTEB's tasks.
        progress: Show progress bars on a terminal.
    """
    raw = inputs.run(runtime, progress=progress)
    set_results = None if data is None else inputs.run_set(runtime, data, progress=progress)
    task_scores = run_tasks(tasks, runner(runtime, progress=progress), runtime.info)
    invariance = {}
    for outcome in run_suite(runtime.model, rows, runtime.tokenizer.max_length, progress=progress):
        values = inputs.agreement(*map(inputs.comparable, (outcome.results, outcome.alone)))
        invariance[outcome.case] = float(values.min() if inputs.sense == "≥" else values.max())
    artifact = runtime.info.artifact
    has_graph = artifact is not None and artifact.manifest.graph is not None
    few = run_few(runtime.model, rows, raw) if has_graph else None
    return Measured(raw, inputs.comparable(raw), set_results, task_scores, invariance, few)


def judge(
    first: Sequence[Gate],
    measured: Measured,
    source: Reference,
    inputs: AnyTask,
    info: ModelInfo,
    thresholds: Thresholds,
    data: RetrievalSet | None,
    tasks: Sequence[Any],
    *,
    progress: bool,
) -> Judged:
    """Run the reference and compare.

    Args:
        first: The gates that need no results.
        measured: The artifact's results.
        source: The reference.
        inputs: The texts or pairs.
        info: The artifact.
        thresholds: The limits.
        data: The retrieval set; None without one.
        tasks: MTEB's tasks.
        progress: Show progress bars on a terminal.

    Raises:
        InputError: The reference's vectors are shorter than the artifact's.
    """
    describe = source.origin.describe
    results = measured.results
    runs = _run_reference(source, inputs.inputs, info.precision, progress)
    expected = next(iter(runs.values()))
    if expected.shape[1:] < results.shape[1:]:
        raise InputError(
            f"the artifact's vectors have {results.shape[1]} values and the reference's "
            f"{expected.shape[1]}: give the checkpoint that it was made from"
        )
    comparisons = tuple(
        inputs.compare(results, outputs, describe(arithmetic))
        for arithmetic, outputs in runs.items()
    )
    gates = [
        *first,
        finite_gate(inputs, measured.raw),
        Gate("reference results with NaN", comparisons[0].reference_nonfinite, "≤", 0),
        *inputs.gates(comparisons[0], results, expected, thresholds),
        invariance_gate(inputs, measured.invariance, thresholds),
    ]
    retrieval = task_report = None
    if data is not None:
        quality = inputs.measure(measured.set_results, data)
        dims = tuple(quality.measures)
        reference_quality, arithmetic = _first_finite(
            lambda arithmetic: source.measure(data, dims, arithmetic, progress=progress),
            lambda quality: quality.nonfinite,
            runs,
        )
        retrieval = compare_quality(quality, reference_quality, data, describe(arithmetic))
        gates += retrieval_gates(retrieval, quality, reference_quality, thresholds)
    if tasks:
        live: Any = source  # a recorded reference is refused with tasks
        reference_scores, arithmetic = _first_finite(
            lambda arithmetic: run_tasks(tasks, live.opened(arithmetic, progress=progress), info),
            lambda scores: sum(score.nonfinite for score in scores),
            runs,
        )
        task_report = compare_scores(
            [task_facts(task) for task in tasks],
            measured.task_scores,
            reference_scores,
            version=version("mteb"),
            run=describe(arithmetic),
        )
        gates += task_gates(task_report, measured.task_scores, reference_scores, thresholds)
    return Judged(
        gates=tuple(gates),
        comparisons=comparisons,
        invariance=measured.invariance,
        worst=_find_worst(inputs, results, expected),
        retrieval=retrieval,
        mteb=task_report,
        results=results,
        expected=expected,
    )


def _first_finite(
    run: Callable[[Arithmetic], Results],
    nonfinite: Callable[[Results], int],
    arithmetics: Iterable[Arithmetic],
) -> tuple[Results, Arithmetic]:
    """The reference's results in the first arithmetic without NaN or infinity, else the last."""
    *others, last = arithmetics
    for arithmetic in others:
        results = run(arithmetic)
        if not nonfinite(results):
            return results, arithmetic
    return run(last), last


def _run_reference(
    source: Reference, inputs: Inputs, precision: str, progress: bool
) -> dict[Arithmetic, np.ndarray]:
    """Run the reference in each arithmetic; the run that the gates use comes first."""
    outputs: dict[Arithmetic, np.ndarray] = {
        arithmetic: source.run(inputs, arithmetic, progress=progress)
        for arithmetic in source.arithmetics()
    }
    preferred = "fp32" if precision == "fp32" else "fp16"
    order = sorted(
        outputs,
        key=lambda name: (int((~finite_rows(outputs[name])).sum()), name != preferred),
    )
    return {arithmetic: outputs[arithmetic] for arithmetic in order}


def _find_worst(task: AnyTask, results: np.ndarray, expected: np.ndarray) -> tuple[Worst, ...]:
    """The inputs farthest from the reference, starting with those that are not finite."""
    values = task.agreement(results, expected)
    badness = np.where(np.isnan(values), np.inf, -values if task.sense == "≥" else values)
    return tuple(
        Worst(task.names[i], float(values[i]), excerpt(task.texts[i]))
        for i in np.argsort(-badness, kind="stable")[:WORST]
    )
