"""A validation's report: figures, gates and verdict, as JSON, Markdown or terminal tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint.spec import Task
from ..strict_json import without_nan
from ..tables import INPUT, Table, count_words, fact_table
from .machine import Machine
from .mteb_scores import TaskReport
from .retrieval import CONFIDENCE, RetrievalReport

EXCERPT = 60
# ir-measures' names of measures to the usual ones.
MEASURES = {"R@100": "recall@100", "RR": "MRR"}
Sense = Literal["≥", "≤"]


@dataclass(frozen=True)
class Gate:
    """A condition that the artifact must meet; NaN fails it.

    Attributes:
        name: The figure that is checked.
        value: The measured value; None if the inputs do not allow a measurement.
        sense: Whether the value must be at least or at most the limit.
        limit: The threshold.
        detail: Where the worst value is; may quote an input.
        basis: The inputs that the value was measured on, or why it was not; quotes no input.
    """

    name: str
    value: float | None
    sense: Sense
    limit: float
    detail: str = ""
    basis: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the value is within the limit; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.sense == "≥" else self.value <= self.limit

    @property
    def failed(self) -> bool:
        """Whether the value was measured and is outside the limit."""
        return self.passed is False

    @property
    def title(self) -> str:
        """The name and the basis."""
        return f"{self.name} ({self.basis})" if self.basis else self.name

    @property
    def verdict(self) -> str:
        """One of "holds", "fails" and "not measured"."""
        return "not measured" if self.passed is None else "holds" if self.passed else "fails"


def unchecked(name: str, reason: str) -> Gate:
    """A gate on a number of differences that could not be counted, and why."""
    return Gate(name, None, "≤", 0, basis=f"not checked: {reason}")


@dataclass(frozen=True)
class Comparison:
    """The artifact compared with one run of the reference.

    Attributes:
        reference: The run's arithmetic and device.
        reference_nonfinite: Number of inputs for which the reference gave NaN or infinity.
        compared: Number of inputs with finite results on both sides; only these are compared.
        figures: Name to value: cosines, score differences and rank agreement, as far as they apply.
            None if the inputs do not allow a measurement.
        dimensions: MRL dimension to cosine figures at that dimension; empty for a reranker.
    """

    reference: str
    reference_nonfinite: int
    compared: int
    figures: Mapping[str, float | None]
    dimensions: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Worst:
    """An input far from the reference: its name, cosine or score difference, and text."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Report:
    """The result of a validation.

    Attributes:
        artifact: The artifact's folder.
        precision: The artifact's precision.
        device: The device that ran the artifact.
        reference: The reference's id, and its revision if it has one.
        library: The library that ran the reference, with its version, and the date if the reference
            was recorded.
        task: "embedding" or "reranker".
        inputs: Number of texts or pairs.
        tokens: Number of tokens in all inputs.
        longest: Tokens of the longest input. Longer ones were not tried.
        max_length: Tokens after which the artifact cuts an input.
        gates: The gates, in the order in which they were checked.
        comparisons: One for each run of the reference; the gates use the first. Empty if the token
            ids differ, as are `invariance` and `worst`: the figures would be meaningless.
        invariance: Case of the invariance suite to its worst agreement with the same texts run
            alone: the smallest cosine, or a reranker's largest score difference.
        worst: The inputs farthest from the reference, the worst first.
        retrieval: Retrieval quality, if a retrieval set was given.
        mteb: Scores on MTEB's tasks, if any were given.
        versions: Versions of the packages that ran the reference and the artifact.
        date: Day of the validation, ISO 8601.
        machine: The machine that ran the artifact, and whose code ran there.
        exported: The machine that exported the artifact, and whose code ran there; "" if not known.
        next_steps: What to do about failed gates.
    """

    artifact: str
    precision: str
    device: str
    reference: str
    library: str
    task: Task
    inputs: int
    tokens: int
    longest: int
    max_length: int
    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...]
    invariance: Mapping[str, float]
    worst: tuple[Worst, ...]
    retrieval: RetrievalReport | None
    versions: Mapping[str, str]
    date: str
    machine: Machine
    exported: str
    next_steps: tuple[str, ...]
    mteb: TaskReport | None = None

    def __repr__(self) -> str:
        # All figures are too long for a notebook; `rich.print` has them.
        return f"Report({self.artifact!r}: {self.verdict()})"

    @property
    def name(self) -> str:
        """The name of the artifact's folder, which may be given as "."."""
        return Path(self.artifact).name or Path(self.artifact).resolve().name

    @property
    def passed(self) -> bool:
        """Whether no gate fails."""
        return not any(gate.failed for gate in self.gates)

    def find_gate(self, name: str) -> Gate | None:
        """The gate of this name, if it was checked."""
        return next((gate for gate in self.gates if gate.name == name), None)

    def to_record(self) -> dict[str, Any]:
        """The report for a manifest, as JSON values (NaN becomes None) and without any input texts.

        The artifact may be published although its owner's texts are private.
        """
        values = self._values()
        del values["worst"], values["artifact"]
        for gate in values["gates"]:
            del gate["detail"]
        return values

    def to_json(self) -> str:
        """The whole report as JSON text; NaN becomes null."""
        return json.dumps(self._values(), indent=2, ensure_ascii=False, allow_nan=False)

    def _values(self) -> dict[str, Any]:
        gates = [{**asdict(gate), "passed": gate.passed} for gate in self.gates]
        return without_nan({"passed": self.passed, **asdict(self), "gates": gates})

    def to_markdown(self) -> str:
        """The report for a model card, without any input texts."""
        steps = "\n".join(f"- {step}" for step in self.next_steps)
        parts = [f"**{self.verdict()}**", *filter(None, [steps])]
        tables = (*self._tables(), self._facts_table())
        return "\n\n".join([*parts, *(table.to_markdown() for table in tables)])

    def verdict(self) -> str:
        """One sentence: the gates that fail, or how many hold, and against which library."""
        failed = [gate.name for gate in self.gates if gate.failed]
        if failed:
            return f"Does not hold against {self.library}: {', '.join(failed)}"
        held = sum(gate.passed is True for gate in self.gates)
        left = [gate.name for gate in self.gates if gate.passed is None]
        unmeasured = f"; not measured: {', '.join(left)}" if left else ""
        return f"Holds against {self.library}: {held} of {held} gates{unmeasured}"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The report for a terminal: `rich.print(report)`."""
        yield from self.conclusion()
        yield ""
        yield from self._tables()
        if self.worst:
            yield self.worst_table()
        yield self._facts_table()

    def conclusion(self) -> Iterator[Any]:
        """Yield lines for a terminal: the verdict, where failed gates fail, and what to do."""
        from rich.text import Text

        # Text, not str: rich would read markup in inputs and paths.
        yield Text(self.verdict(), style="bold green" if self.passed else "bold red")
        for gate in self.gates:
            if gate.detail and gate.failed:
                yield Text(f"  {gate.name}: {gate.detail}", style="red")
        for step in self.next_steps:
            yield Text(f"  → {step}")

    def short_tables(self) -> Iterator[Table]:
        """Yield the tables that fit into a terminal: gates, and what was asked for beside them.

        Retrieval is at the full width only.
        """
        yield replace(self.gates_table(), title="")
        if self.retrieval is not None:
            rows = self.retrieval.rows
            full = tuple(row for row in rows if row.dimension == rows[0].dimension)
            yield self.retrieval_table(replace(self.retrieval, rows=full))
        if self.mteb is not None:
            yield self.tasks_table(self.mteb)

    def _facts_table(self) -> Table:
        return fact_table(self.facts(), "How it was measured")

    def _tables(self) -> Iterator[Table]:
        """Yield the tables without input texts."""
        yield self.gates_table()
        if self.comparisons:
            yield self.parity_table()
            if self.comparisons[0].dimensions:
                yield self.dimensions_table()
            if self.retrieval is not None:
                yield self.retrieval_table(self.retrieval)
            if self.mteb is not None:
                yield self.tasks_table(self.mteb)
            yield self.invariance_table()

    def gates_table(self) -> Table:
        """Each gate's value, limit and verdict."""
        rows = tuple(
            (gate.title, number(gate.value), f"{gate.sense} {number(gate.limit)}", gate.verdict)
            for gate in self.gates
        )
        failed = frozenset(i for i, gate in enumerate(self.gates) if gate.failed)
        return Table(("Gate", "Found", "Limit", "Verdict"), rows, "Gates", failed)

    def parity_table(self) -> Table:
        """All figures, a column for each run of the reference."""
        runs = self.comparisons
        names = dict.fromkeys(name for run in runs for name in run.figures)
        rows = (
            *((name, *(number(run.figures.get(name)) for run in runs)) for name in names),
            ("inputs compared", *(f"{run.compared:,}" for run in runs)),
            ("reference results with NaN", *(str(run.reference_nonfinite) for run in runs)),
        )
        return Table(("Against", *(run.reference for run in runs)), rows, "Parity")

    def dimensions_table(self) -> Table:
        """The figures at each MRL dimension."""
        dimensions = self.comparisons[0].dimensions
        rows = tuple(
            (str(dim), *map(number, values.values())) for dim, values in dimensions.items()
        )
        return Table(("Dim.", *next(iter(dimensions.values()))), rows, "By dimension (MRL)")

    def retrieval_table(self, retrieval: RetrievalReport) -> Table:
        """Each measure of both sides, and the difference with its interval."""
        title = (
            f"Retrieval on {retrieval.name}: {count_words(retrieval.queries, 'query', 'queries')}, "
            f"{retrieval.documents:,} documents, against {retrieval.reference}"
        )
        if not retrieval.measured:
            title += (
                "; not measured: no query's reference scores differ, or none ranks a relevant "
                "document in the top ten"
            )
        if retrieval.before is not None:
            title += f"; nDCG@10 of the candidates as they came {retrieval.before:.4f}"
        rows = tuple(
            (
                MEASURES.get(row.measure, row.measure),
                str(row.dimension or "–"),
                f"{row.artifact:.4f}",
                f"{row.reference:.4f}",
                f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]",
            )
            for row in retrieval.rows
        )
        difference = f"Difference, {CONFIDENCE} % interval"
        return Table(("Measure", "Dim.", "Artifact", "Reference", difference), rows, title)

    def tasks_table(self, scores: TaskReport) -> Table:
        """MTEB's score of each task, of both sides, and the difference with its interval."""
        rows = tuple(
            (
                f"{row.task}: {row.measure}",
                "–" if row.samples is None else f"{row.samples:,}",
                f"{row.artifact:.4f} ({row.reference:.4f})",
                f"{row.difference:+.4f} ({row.interval})",
            )
            for row in scores.rows
        )
        # A terminal of 80 columns has room for four.
        header = ("Task", "Queries or pairs", "Score (of the reference)")
        title = f"MTEB {scores.version}, against {scores.reference}"
        return Table((*header, f"Difference ({CONFIDENCE} % interval)"), rows, title)

    def invariance_table(self) -> Table:
        """The worst agreement of a text alone and in each arrangement."""
        embedding = self.task == "embedding"
        gate = self.find_gate("batch invariance")
        cases = list(self.invariance.items())
        failed = frozenset(
            i for i, (_, value) in enumerate(cases) if gate and replace(gate, value=value).failed
        )
        rows = tuple(
            (case, number(value), *([short(from_one(value))] if embedding else []))
            for case, value in cases
        )
        figures = ("Smallest cosine", self.measure) if embedding else ("Largest difference",)
        return Table(("A text alone and …", *figures), rows, "Batch invariance", failed)

    def worst_table(self) -> Table:
        """The inputs farthest from the reference; shows the beginning of their texts."""
        embedding = self.task == "embedding"
        rows = tuple(
            (worst.name, short(from_one(worst.value) if embedding else worst.value), worst.text)
            for worst in self.worst
        )
        header = ("Input", self.measure.capitalize(), "Text")
        return Table(header, rows, "Farthest from the reference", long=frozenset({2}))

    @property
    def measure(self) -> str:
        """How far an input is from the reference: the figure's name."""
        return "1 − cosine" if self.task == "embedding" else "difference"

    def facts(self) -> dict[str, str]:
        """How it was measured: what ran, where, on which inputs, in which versions."""
        machine = self.machine
        memory = f", {machine.memory / 2**30:.1f} GiB" if machine.memory else ""
        sets = ", ".join(machine.instructions)
        facts = {
            "Artifact": f"{self.name}, {self.precision} on {self.device}",
            "Exported on": self.exported,
            "Reference": f"{self.reference} in {self.library}",
            "Reference ran in": "; ".join(run.reference for run in self.comparisons),
            "Inputs": f"{count_words(self.inputs, INPUT[self.task])}, {self.tokens:,} tokens",
            "Longest input": f"{self.longest:,} tokens, of {self.max_length:,} that it takes",
            "Date": self.date,
            "Processor": f"{machine.cpu}, {count_words(machine.cores, 'core')}{memory}",
            "Instruction sets": sets,
            "Computed by": machine.code,
            "System": f"{machine.system}, Python {machine.python}",
            "Versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "onnxruntime offers": ", ".join(machine.providers),
        }
        return {name: value for name, value in facts.items() if value}


def number(value: float | None) -> str:
    """Format a figure: enough digits to tell 0.999999 from 1, and small values as 1.23e-06.

    None becomes "not measured".
    """
    if value is None:
        return "not measured"
    if math.isnan(value):
        return "NaN"
    if value == 0 or isinstance(value, int):
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.7f}"


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * EXCERPT].split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 1]}…"


def from_one(cosine: Any) -> Any:
    """1 - cosine of a float or an array, at least 0: rounding can put a cosine above 1."""
    return np.maximum(1 - cosine, 0)


def short(value: float) -> str:
    """A figure with few digits: 1.2e-06, 0.0123."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
