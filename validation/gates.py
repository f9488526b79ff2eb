"""The gates that embedders and rerankers share; those on vectors or scores are in `tasks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .measures import finite_rows
from .mteb_scores import TaskReport, TaskScore
from .report import Gate, excerpt
from .retrieval import RetrievalReport, SetQuality
from .tasks import AnyTask
from .thresholds import Thresholds

# Most inputs that a gate names.
NAMED = 10


def token_gate(
    task: AnyTask,
    rows: Sequence[np.ndarray],
    expected_rows: Sequence[Sequence[int]],
) -> Gate:
    """Every input has the token ids that the reference really fed its model."""
    different = [
        i
        for i, (ids, expected) in enumerate(zip(rows, expected_rows, strict=True))
        if ids.tolist() != list(expected)
    ]
    detail = ""
    if different:
        i = different[0]
        detail = (
            f"{task.names[i]}, {excerpt(task.texts[i])!r}: "
            f"{_first_difference(rows[i].tolist(), expected_rows[i])}"
        )
    return Gate("inputs with other token ids", len(different), "≤", 0, detail)


def _first_difference(ids: Sequence[int], expected: Sequence[int]) -> str:
    shared = min(len(ids), len(expected))
    position = next((i for i in range(shared) if ids[i] != expected[i]), shared)
    artifact, reference = (
        str(row[position]) if position < len(row) else "nothing" for row in (ids, expected)
    )
    return f"token {position} is {artifact}, in the reference {reference}"


def finite_gate(task: AnyTask, results: np.ndarray) -> Gate:
    """No result of the artifact is NaN or infinite."""
    bad = np.flatnonzero(~finite_rows(results))
    detail = ", ".join(task.names[i] for i in bad[:NAMED])
    return Gate("results with NaN or infinity", len(bad), "≤", 0, detail)


def task_gates(
    report: TaskReport,
    artifact: Sequence[TaskScore],
    reference: Sequence[TaskScore],
    thresholds: Thresholds,
) -> list[Gate]:
    """The loss of each MTEB task's main score, and that neither side gave NaN or infinity.

    A task of which the reference gets nothing right cannot show a loss.
    """
    return [
        Gate("MTEB: NaN or infinity", sum(score.nonfinite for score in artifact), "≤", 0),
        Gate("MTEB: reference's NaN", sum(score.nonfinite for score in reference), "≤", 0),
        *(
            Gate(
                f"{row.task}: {row.measure} loss",
                0 - row.difference if row.reference else None,
                "≤",
                thresholds.max_ndcg_loss,
                basis="" if row.reference else "the reference scores 0",
            )
            for row in report.rows
        ),
    ]


def retrieval_gates(
    report: RetrievalReport, artifact: SetQuality, reference: SetQuality, thresholds: Thresholds
) -> list[Gate]:
    """The loss of nDCG@10 on the retrieval set, and that neither side gave NaN or infinity."""
    return [
        Gate("retrieval: NaN or infinity", artifact.nonfinite, "≤", 0),
        Gate("retrieval: reference's NaN", reference.nonfinite, "≤", 0),
        Gate("nDCG@10 loss", report.ndcg_loss, "≤", thresholds.max_ndcg_loss),
    ]


def invariance_gate(task: AnyTask, invariance: Mapping[str, float], thresholds: Thresholds) -> Gate:
    """A text gives the same result alone and in each case of the suite; the worst counts."""
    values = np.array(list(invariance.values()))
    # argmin and argmax return the first NaN, if there is one.
    worst = int(np.argmin(values) if task.sense == "≥" else np.argmax(values))
    limit = task.invariance_limit(thresholds)
    return Gate(
        "batch invariance", float(values[worst]), task.sense, limit, list(invariance)[worst]
    )
