"""`embedport demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tables import Table
from .outputs import stderr_console, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.pipeline import Demo
    from ..validation import Report

NEXT = """\
With a real checkpoint, in a Python environment of your own:
  pip install '.[cpu,torch]'
  embedport export onnx Qwen/Qwen3-Embedding-0.6B -o qwen3-fp32
  embedport encode qwen3-fp32 --prompt query "What is the capital of China?"
  embedport validate qwen3-fp32 --reference Qwen/Qwen3-Embedding-0.6B"""


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The output folder.")] = Path(
        "demo-output"
    ),
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Run the reference in torch instead of using the recorded one."
        ),
    ] = False,
) -> None:
    """Run the main job on two small trained models: export, search, rerank, validate, report."""
    from ..demo.pipeline import run_demo

    steps, console = stderr_console(), stdout_console()
    result = run_demo(out, lambda step: steps.print(f"{step} …", style="dim"), live=live)
    _print_answers(console, result)
    _print_parity(console, result)
    console.rule("The artifacts, and the report of each", align="left")
    for path in (*result.artifacts, *result.pages):
        console.print(f"  {path}", soft_wrap=True)
    console.print(NEXT, soft_wrap=True)
    raise typer.Exit(0 if all(report.passed for report in result.reports) else 1)


def _print_answers(console: Console, result: Demo) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    console.rule(f"Three queries on {result.documents:,} documents, in int8", align="left")
    for answer in result.answers:
        table = RichTable("", "", box=SIMPLE_HEAD, expand=True)
        table.add_column(Text(answer.query), overflow="ellipsis", no_wrap=True, ratio=1)
        for name, ranked in (("cosine", answer.found), ("reranked", answer.reranked)):
            for i, hit in enumerate(ranked):
                table.add_row("" if i else name, f"{hit.score:.3f}", Text(hit.document))
            table.add_section()
        console.print(table)


def _print_parity(console: Console, result: Demo) -> None:
    console.rule("Parity with the checkpoints' own libraries", align="left")
    if not result.reports:
        console.print(
            "Not measured: a package is missing. Install it and run the demo again:\n"
            "pip install 'embedport[cpu,retrieval,report]'",
            markup=False,  # rich would read the brackets as markup
        )
        return
    for task in dict.fromkeys(report.task for report in result.reports):
        first = next(report for report in result.reports if report.task == task)
        console.print(f"{first.inputs} inputs of the {task} model in {first.library}:")
        console.print(_parity([report for report in result.reports if report.task == task]))
    console.print("All figures: README.md in each artifact's folder.")


def _parity(reports: Sequence[Report]) -> Table:
    """One column per precision: each gate's value and limit, then the other figures."""
    from ..validation.report import number

    rows: list[tuple[str, ...]] = []
    gates = [{gate.name: gate for gate in report.gates} for report in reports]
    for name in gates[0]:
        shown = (
            number(g.value) if g.value is None else f"{number(g.value)} {g.sense} {number(g.limit)}"
            for g in (by_name[name] for by_name in gates)
        )
        rows.append((name, *shown))
    figures = [report.comparisons[0].figures if report.comparisons else {} for report in reports]
    for name in figures[0]:
        if name not in gates[0]:
            rows.append((name, *(number(values.get(name, float("nan"))) for values in figures)))
    quality = [report.retrieval.rows[0] for report in reports if report.retrieval is not None]
    if quality:
        shown = (f"{row.artifact:.4f} ({row.reference:.4f})" for row in quality)
        rows.append(("nDCG@10 (of the reference)", *shown))
        counts = [report.retrieval.queries for report in reports if report.retrieval is not None]
        rows.append(("queries of nDCG@10", *(f"{count:,}" for count in counts)))
        before = [report.retrieval.before for report in reports if report.retrieval is not None]
        if before[0] is not None:
            rows.append(("nDCG@10 before reranking", *(f"{value:.4f}" for value in before)))
    rows.append(("", *("holds" if report.passed else "FAILS" for report in reports)))
    return Table(("", *(report.precision for report in reports)), tuple(rows))
