"""`python -m benchmarks`: all of it, or one measurement by its name."""

from __future__ import annotations

from typing import Annotated

import typer

from . import backend, export, inference, parity

app = typer.Typer(add_completion=False, invoke_without_command=True)
Rounds = Annotated[int, typer.Option(help="Interleaved rounds.")]


@app.callback()
def everything(context: typer.Context) -> None:
    """Measure everything but the 8B geometry, which needs 35 GB of disk."""
    if context.invoked_subcommand is None:
        export.against_peer(3)
        inference.against_peer(7)
        parity.against_transformers()
        backend.in_sentence_transformers()


@app.command("export")
def _export(rounds: Rounds = 3) -> None:
    """Export time and memory against optimum-onnx."""
    export.against_peer(rounds)


@app.command("export-8b")
def _export_8b(precision: str = "bf16") -> None:
    """Peak memory of exporting the 8B geometry."""
    export.large(precision)


@app.command("inference")
def _inference(rounds: Rounds = 7) -> None:
    """Tokens a second in fp32 against optimum-onnx's graph."""
    inference.against_peer(rounds)


@app.command("parity")
def _parity() -> None:
    """Parity at the 0.6B geometry."""
    parity.against_transformers()


@app.command("backend")
def _backend() -> None:
    """The artifact in sentence-transformers' ONNX backend."""
    backend.in_sentence_transformers()


app()
