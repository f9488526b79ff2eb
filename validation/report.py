"""What a validation found: as data, as JSON, as Markdown for the model card, and in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TEXT_WIDTH = 60


@dataclass(frozen=True)
class Gate:
    """One condition: a value, the limit it is held to, and whether it holds."""

    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the value is on the right side; NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Comparison:
    """The artifact against one reference.

    Attributes:
        reference: What the reference computed in, and where.
        reference_nonfinite: Its results with NaN or infinity.
        figures: Name to value: cosine or score difference, and rank agreement.
        dimensions: Embedding dimension (MRL) to its mean and minimum cosine; embeddings.
        worst: (number of the text, its agreement), the worst first.
    """

    reference: str
    reference_nonfinite: int
    figures: Mapping[str, float]
    dimensions: Mapping[int, tuple[float, float]]
    worst: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    """A validation.

    Attributes:
        artifact: The artifact's folder.
        checkpoint: The reference's folder or hub id.
        task: "embedding" or "reranker".
        precision: What the artifact computes in.
        device: What it ran on.
        texts: The texts (or "query | document").
        mismatch: Where token ids first differ, in words; None where they are all equal. There are
            no figures if they differ.
        nonfinite: The artifact's results with NaN or infinity.
        comparisons: The reference that decides first, others beside it.
        invariance: Arrangement to agreement with each text alone.
        gates: What decides.
        versions: Packages that ran.
        date: Day of the validation, ISO 8601.
    """

    artifact: str
    checkpoint: str
    task: str
    precision: str
    device: str
    texts: Sequence[str]
    mismatch: str | None
    nonfinite: int
    comparisons: Sequence[Comparison]
    invariance: Mapping[str, float]
    gates: Sequence[Gate]
    versions: Mapping[str, str]
    date: str

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, the texts by their number only."""
        values = asdict(self)
        values["texts"] = len(self.texts)
        values["passed"] = self.passed
        for gate, written in zip(self.gates, values["gates"], strict=True):
            written["passed"] = gate.passed
        return values

    def to_json(self) -> str:
        """The report as JSON text; NaN is written as null."""
        return json.dumps(_null_nan(self.to_dict()), indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """The report for a model card."""
        parts = [f"**{self.verdict()}**", self.method()]
        parts += [_markdown(title, rows) for title, rows in self.tables()]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """One sentence: what holds or what does not."""
        if self.passed:
            return f"Holds: {len(self.gates)} of {len(self.gates)} gates"
        failed = [gate.name for gate in self.gates if not gate.passed]
        return f"Does not hold: {', '.join(failed)}"

    def method(self) -> str:
        """One sentence: what was compared with what, where and with which versions."""
        against = f", against {self.comparisons[0].reference}" if self.comparisons else ""
        kind = "pairs" if self.task == "reranker" else "texts"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{len(self.texts)} {kind}; {self.precision} on {self.device}{against} of "
            f"`{self.checkpoint}`; {versions}; {self.date}."
        )

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """(title, rows) of each table, the first row its head."""
        rows: list[tuple[str, ...]]
        yield (
            "Gates",
            [("Gate", "Value", "Limit", "")]
            + [
                (
                    gate.name,
                    number(gate.value),
                    f"{'≥' if gate.at_least else '≤'} {number(gate.limit)}",
                    "holds" if gate.passed else "FAILS",
                )
                for gate in self.gates
            ],
        )
        if self.mismatch:
            yield "Token ids", [("Where they differ",), (self.mismatch,)]
        for comparison in self.comparisons:
            rows = [("Measure", "Value")]
            rows += [(name, number(value)) for name, value in comparison.figures.items()]
            rows.append(("reference results with NaN", str(comparison.reference_nonfinite)))
            yield f"Against {comparison.reference}", rows
        if self.comparisons and self.comparisons[0].dimensions:
            yield (
                "By dimension (MRL)",
                [("Dimension", "Mean cosine", "Minimum cosine")]
                + [
                    (str(dim), number(mean), number(least))
                    for dim, (mean, least) in self.comparisons[0].dimensions.items()
                ],
            )
        measure = "Largest difference" if self.task == "reranker" else "Minimum cosine"
        if self.invariance:
            yield (
                "A text alone and …",
                [("Arrangement", measure)]
                + [(name, number(value)) for name, value in self.invariance.items()],
            )
        if self.comparisons:
            yield (
                "Worst texts",
                [("Text", measure.split()[1].capitalize())]
                + [
                    (shorten(self.texts[i]), number(value))
                    for i, value in self.comparisons[0].worst
                ],
            )

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Verdict first, then the tables."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        yield Text(self.verdict(), style="bold green" if self.passed else "bold red")
        yield Text(self.method().replace("`", ""), style="dim")
        for title, (head, *rows) in self.tables():
            table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
            for i, column in enumerate(head):
                table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
            for row in rows:
                cells = [Text(cell) for cell in row]
                if row[-1] == "FAILS":
                    cells = [Text(cell, style="red") for cell in row]
                table.add_row(*cells)
            yield table


def number(value: float) -> str:
    """A figure for people: enough digits to tell 0.999999 from 1, small ones as 1.2e-06."""
    if value != value:
        return "NaN"
    if value == 0 or isinstance(value, int):
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.7f}"


def shorten(text: str) -> str:
    """A text on one line of at most 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else f"{line[: TEXT_WIDTH - 1]}…"


def _markdown(title: str, rows: list[tuple[str, ...]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _null_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_null_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value
