"""The report as one self-contained HTML page: no scripts, no requests, no fonts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from ..checkpoint.spec import Task
from ..errors import require
from ..tables import INPUT, Table, count_words
from .charts import POINTS, histogram, layer_lines, retrieval_differences, retrieval_values, scatter
from .details import Details
from .layers import LayerError, largest_growth
from .report import Gate, Report, from_one, number, short
from .retrieval import CONFIDENCE, RetrievalReport

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Chart:
    """A chart as SVG (None if there is nothing to draw) with a title and a caption."""

    title: str
    svg: str | None
    caption: str


def render(report: Report, details: Details) -> str:
    """Render the page; the same report and details give the same bytes.

    Args:
        report: The report.
        details: The details that are not in the report.

    Returns:
        The text of an HTML file.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = (files("embedport.validation") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(report, details))


def _content(report: Report, details: Details) -> dict[str, Any]:
    """The template's variables."""
    retrieval: RetrievalReport | None = report.retrieval
    compared = bool(report.comparisons)
    return {
        "title": report.name,
        "passed": report.passed,
        "sentence": _sentence(report),
        "reasons": [_reason(gate) for gate in report.gates if gate.failed],
        "subject": f"{report.precision} on {report.device}, against {report.reference}; "
        f"computed by {report.machine.code}",
        "steps": report.next_steps,
        "gates": report.gates_table(),
        "parity": report.parity_table() if compared else None,
        "dimensions": report.dimensions_table()
        if compared and report.comparisons[0].dimensions
        else None,
        "agreement": _agreement(report, details) if compared else None,
        "scores": _scores(report.task, details) if len(details.reference_scores) else None,
        "layers": _layers(details.layers) if details.layers else None,
        "why_no_layers": _why_no_layers(details),
        "retrieval": _retrieval(report, retrieval) if retrieval else None,
        "tasks": report.tasks_table(report.mteb) if report.mteb else None,
        "tasks_against": f"MTEB {report.mteb.version}, against the reference in "
        f"{report.mteb.reference}. Intervals are bootstrapped over queries or pairs."
        if report.mteb
        else "",
        "worst": report.worst_table() if compared else None,
        "invariance": report.invariance_table() if compared else None,
        "facts": report.facts(),
        "hashes": _hashes(details),
        "command": details.command,
    }


def _sentence(report: Report) -> str:
    count = len(report.gates)
    failed = sum(gate.failed for gate in report.gates)
    inputs = count_words(report.inputs, INPUT[report.task])
    if not report.comparisons:
        return (
            f"The artifact and the reference make different tokens of some of {inputs}, so nothing "
            "else was computed: no figure would mean anything."
        )
    if failed:
        return f"{failed} of {count} gates fail on {inputs} against {report.library}."
    left = sum(gate.passed is None for gate in report.gates)
    held = f"{count - left} gates hold" if left else f"all {count} gates hold"
    unmeasured = f"; {left} could not be measured" if left else ""
    return (
        f"On {inputs} the artifact stays within every limit: {held} against {report.library}"
        f"{unmeasured}."
    )


def _reason(gate: Gate) -> str:
    text = f"{gate.name}: {number(gate.value)}, should be {gate.sense} {number(gate.limit)}"
    return f"{text} ({gate.detail})" if gate.detail else text


def _agreement(report: Report, details: Details) -> Chart:
    """A histogram of the inputs' distances from the reference, and its caption."""
    embedding = report.task == "embedding"
    noun, measure = f"{INPUT[report.task]}s", report.measure
    title = f"How far the {noun} are from the reference"
    distances = from_one(details.agreement) if embedding else details.agreement
    finite = distances[np.isfinite(distances)]
    lost = len(distances) - len(finite)
    left_out = f" {lost:,} without a finite result are left out." if lost else ""
    if not len(finite):
        return Chart(title, None, f"There is no finite result to show.{left_out}")
    gate = report.find_gate("minimum cosine" if embedding else "maximum score difference")
    limit = None if gate is None else 1 - gate.limit if embedding else gate.limit
    words = [f"median {_inline(np.median(finite))}", f"worst {_inline(finite.max())}"]
    words += [] if limit is None else [f"limit {_inline(limit)}"]
    caption = f"{measure[0].upper()}{measure[1:]} of {len(finite):,} {noun}: {', '.join(words)}."
    if embedding:
        caption += " A cosine of 0.999 stands at 10⁻³, one of 0.9999999 at 10⁻⁷."
    return Chart(title, histogram(finite, limit, noun=noun, measure=measure), caption + left_out)


def _scores(task: Task, details: Details) -> Chart:
    reference, artifact = details.reference_scores, details.artifact_scores
    differences = np.abs(np.subtract(artifact, reference))
    kind, score, subject = (
        ("similarities", "cosine", "a query and a document")
        if task == "embedding"
        else ("probabilities", "probability", "a pair")
    )
    caption = (
        f"{len(reference):,} {kind}, each of {subject}; on the diagonal both agree. Differences: "
        f"mean {_inline(differences.mean())}, largest {_inline(differences.max())}."
    )
    if len(reference) > POINTS:
        caption += f" {POINTS:,} are drawn, those farthest off among them."
    return Chart(
        f"The reference's {kind} and the artifact's",
        scatter(reference, artifact, score=score),
        caption,
    )


def _layers(errors: Sequence[LayerError]) -> tuple[Chart, Table]:
    means = np.array([error.relative_error_mean for error in errors])
    caption = (
        f"|artifact − reference| / |reference| of the hidden states: mean over tokens "
        f"{_inline(means[0])} after the embedding, {_inline(means[-1])} after layer "
        f"{errors[-1].layer}. "
    )
    # After the last layer of a pooled graph, only each text's last token is left.
    comparable = [error for error in errors if error.tokens == errors[0].tokens]
    if len(comparable) < len(errors):
        caption += f"After that layer only each text's last token is left ({errors[-1].tokens}). "
    if not np.isfinite(means).all():
        first = errors[int(np.flatnonzero(~np.isfinite(means))[0])].layer
        caption += f"It is not finite from layer {first} on."
    elif growth := largest_growth(errors):
        among = "" if len(comparable) == len(errors) else ", of those before it,"
        caption += f"It grows most{among} in layer {growth[1].layer}."
    table = Table(
        ("Layer", "Mean error", "Largest error", "Largest 1 − cosine"),
        tuple(
            (
                "embedding" if error.layer == 0 else str(error.layer),
                short(error.relative_error_mean),
                short(error.relative_error_max),
                short(from_one(error.cosine_min)),
            )
            for error in errors
        ),
    )
    return Chart("Relative error after each layer", layer_lines(errors), caption), table


def _why_no_layers(details: Details) -> str:
    if details.layers is None:
        return "It was not measured."
    return (
        "The residual stream of this graph is rotated, and the graph does not hold the matrix that "
        "rotates it back: its hidden states cannot be compared with the reference's."
    )


def _retrieval(report: Report, retrieval: RetrievalReport) -> tuple[Chart, Chart, Table]:
    rows = retrieval.rows
    clear = [row for row in rows if not row.low <= 0 <= row.high]
    before = ""
    if retrieval.before is not None:
        before = f" Before reranking nDCG@10 was {retrieval.before:.4f}."
    caption = f"Artifact less reference, {CONFIDENCE} % bootstrap intervals over the queries: " + (
        f"{len(clear)} of {len(rows)} exclude zero."
        if clear
        else "all include zero, so no difference shows."
    )
    if not retrieval.measured:
        caption = (
            "Not measured: the reference gives all candidates of a query the same score, or ranks "
            "no relevant document in the top ten."
        )
    values = Chart(
        "Quality",
        retrieval_values(rows),
        f"{retrieval.name}: {retrieval.queries:,} queries, {retrieval.documents:,} documents. "
        f"Points are the artifact, rings the reference ({retrieval.reference}).{before}",
    )
    difference = Chart("Difference", retrieval_differences(rows), caption)
    return values, difference, report.retrieval_table(retrieval)


def _hashes(details: Details) -> Table:
    rows = [("artifact", *item) for item in details.artifact_files.items()]
    rows += [("reference", *item) for item in details.reference_files.items()]
    return Table(("Of", "File", "sha256"), tuple(rows), text=frozenset({0, 1}), long=frozenset({2}))


def _inline(value: float) -> str:
    """`short` with non-breaking hyphens, for use in a sentence."""
    return short(value).replace("-", "\N{NON-BREAKING HYPHEN}")
