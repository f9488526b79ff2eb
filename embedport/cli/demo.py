"""`embedport demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .outputs import stderr_console, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.pipeline import Demo

NEXT = """\
With a real checkpoint:
  embedport export onnx Qwen/Qwen3-Embedding-0.6B -o qwen3-fp32
  embedport encode qwen3-fp32 --prompt query "What is the capital of China?"
  embedport validate qwen3-fp32 --reference Qwen/Qwen3-Embedding-0.6B"""


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to work.")] = Path("demo-output"),
) -> None:
    """Run the main job on a small built-in pair: export, encode, rerank, validate."""
    from ..demo.pipeline import run_demo

    steps, console = stderr_console(), stdout_console()
    result = run_demo(out, lambda step: steps.print(f"{step} …", style="dim"))
    _print(console, result)
    raise typer.Exit(0 if all(report.passed for report in result.reports) else 1)


def _print(console: Console, result: Demo) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ..demo.pipeline import DOCUMENTS, QUERIES

    console.rule("Embedding", align="left")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("Cosine")
    for document in DOCUMENTS:
        table.add_column(f"{document[:24]}…", justify="right")
    for query, row in zip(QUERIES, result.similarities, strict=True):
        table.add_row(query, *(f"{value:.4f}" for value in row))
    console.print(table)
    console.rule("Reranking", align="left")
    console.print(Text(result.query))
    for ranked in result.ranking:
        console.print(Text(f"  {ranked.score:.4f}  {ranked.document[:70]}"))
    for report in result.reports:
        console.rule(f"Parity of the {report.task} artifact", align="left")
        console.print(report)
    console.rule("Where it is", align="left")
    console.print(
        "The weights are random: cosines and scores mean nothing here, parity with the reference "
        "means what it does for a trained model."
    )
    for task in ("embedding", "reranker"):
        console.print(f"  {result.folder / task}", soft_wrap=True)
    console.print(NEXT, soft_wrap=True)
