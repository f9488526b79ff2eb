"""A validation's report: figures, gates and verdict, as JSON, Markdown or terminal tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..checkpoint.spec import Task
from ..files import without_nan
from .mteb_scores import TaskReport
from .retrieval import RetrievalReport

EXCERPT = 60
# ir-measures' names of measures to the usual ones.
MEASURES = {"R@100": "recall@100", "RR": "MRR"}
Sense = Literal["≥", "≤"]
Table = tuple[str, list[str], list[list[str]]]


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
    """

    artifact: str
    precision: str
    device: str
    reference: str
    library: str
    task: Task
    inputs: int
    tokens: int
    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...]
    invariance: Mapping[str, float]
    worst: tuple[Worst, ...]
    retrieval: RetrievalReport | None
    versions: Mapping[str, str]
    date: str
    mteb: TaskReport | None = None

    @property
    def passed(self) -> bool:
        """Whether no gate fails."""
        return not any(gate.failed for gate in self.gates)

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
        parts = [f"**{self.verdict()}**", self.method()]
        parts += [_markdown(*table) for table in self._tables()]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """One sentence: the gates that fail, or how many hold."""
        failed = [gate.name for gate in self.gates if gate.failed]
        if failed:
            return f"Does not hold: {', '.join(failed)}"
        held = sum(gate.passed is True for gate in self.gates)
        left = [gate.name for gate in self.gates if gate.passed is None]
        unmeasured = f"; not measured: {', '.join(left)}" if left else ""
        return f"Holds: {held} of {held} gates{unmeasured}"

    def method(self) -> str:
        """One sentence: what was compared, on which devices and with which versions."""
        noun = "texts" if self.task == "embedding" else "pairs"
        run = f"{self.comparisons[0].reference} of " if self.comparisons else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.inputs:,} {noun}, {self.tokens:,} tokens; {self.precision} on {self.device} "
            f"against {run}{self.reference} in {self.library}; {versions}; {self.date}."
        )

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The report for a terminal: `rich.print(report)`."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        # Text, not str: rich would read markup in inputs and paths.
        yield Text(self.verdict(), style="bold green" if self.passed else "bold red")
        for gate in self.gates:
            if gate.detail and gate.failed:
                yield Text(f"  {gate.name}: {gate.detail}", style="red")
        yield Text(self.method(), style="dim")
        for title, header, rows in (*self._tables(), *self._worst_table()):
            table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
            for column in header:
                side = "left" if column in (header[0], "Text") else "right"
                table.add_column(column, justify=side, overflow="fold")
            for row in rows:
                style = "red" if row[-1] == "FAILS" else ""
                table.add_row(*(Text(cell, style=style) for cell in row))
            yield table

    def _tables(self) -> Iterator[Table]:
        """Yield (title, header, rows) of each non-empty table."""
        yield (
            "Gates",
            ["Gate", "Found", "Limit", ""],
            [
                [
                    gate.title,
                    number(gate.value),
                    f"{gate.sense} {number(gate.limit)}",
                    "FAILS" if gate.failed else gate.verdict,
                ]
                for gate in self.gates
            ],
        )
        if not self.comparisons:
            return
        names = dict.fromkeys(name for run in self.comparisons for name in run.figures)
        rows = [
            [name, *(number(run.figures.get(name, math.nan)) for run in self.comparisons)]
            for name in names
        ]
        rows += [
            ["inputs compared", *(str(run.compared) for run in self.comparisons)],
            [
                "reference results with NaN",
                *(str(run.reference_nonfinite) for run in self.comparisons),
            ],
        ]
        yield "Parity", ["Against", *(run.reference for run in self.comparisons)], rows
        dimensions = self.comparisons[0].dimensions
        if dimensions:
            yield (
                "By dimension (MRL)",
                ["Dimension", *next(iter(dimensions.values()))],
                [[str(dim), *map(number, values.values())] for dim, values in dimensions.items()],
            )
        if self.retrieval is not None:
            yield self._retrieval_table(self.retrieval)
        if self.mteb is not None:
            yield _task_table(self.mteb)
        yield (
            "A text alone and …",
            ["Arrangement", f"worst {self._measure()}"],
            [[case, number(value)] for case, value in self.invariance.items()],
        )

    def _retrieval_table(self, found: RetrievalReport) -> Table:
        title = (
            f"Retrieval on {found.name}: {found.queries:,} queries, {found.documents:,} documents, "
            f"against {found.reference}"
        )
        if not found.measured:
            title += "; not measured: no query's reference scores differ"
        if found.before is not None:
            title += f"; nDCG@10 of the candidates as they came {found.before:.4f}"
        header = ["Measure", "Dimension", "Artifact", "Reference", "Difference", "95 % interval"]
        rows = [
            [
                MEASURES.get(row.measure, row.measure),
                str(row.dimension or "—"),
                f"{row.artifact:.4f}",
                f"{row.reference:.4f}",
                f"{row.difference:+.4f}",
                f"{row.low:+.4f} to {row.high:+.4f}",
            ]
            for row in found.rows
        ]
        return title, header, rows

    def _worst_table(self) -> Iterator[Table]:
        """Not part of `_tables`, because it shows input texts."""
        if self.worst:
            rows = [[worst.name, number(worst.value), worst.text] for worst in self.worst]
            yield "Worst", ["Input", self._measure(), "Text"], rows

    def _measure(self) -> str:
        return "cosine" if self.task == "embedding" else "difference"


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


def _task_table(found: TaskReport) -> Table:
    return (
        f"MTEB {found.version}, against {found.reference}",
        ["Task", "Measure", "Artifact", "Reference", "Difference", "95 % interval"],
        [
            [
                row.task,
                row.measure,
                f"{row.artifact:.4f}",
                f"{row.reference:.4f}",
                f"{row.difference:+.4f}",
                row.interval,
            ]
            for row in found.rows
        ],
    )


def _markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
