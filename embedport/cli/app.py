"""The verbs put together, and how errors come out."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated

import typer

from ..errors import EmbedportError
from ..version import __version__
from . import demo, encode, export, inspect, rerank, validate

app = typer.Typer(
    name="embedport",
    help="Take a Qwen3-Embedding or Qwen3-Reranker checkpoint to ONNX, run it, and prove how close "
    "it stays to the reference.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
export_app = typer.Typer(help="Turn a checkpoint into an artifact.", no_args_is_help=True)
export_app.command("onnx")(export.export_onnx)
app.add_typer(export_app, name="export")
app.command("encode")(encode.encode)
app.command("rerank")(rerank.rerank)
app.command("validate")(validate.validate)
app.command("inspect")(inspect.inspect)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedport {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version)
    ] = False,
) -> None:
    """Global options, before the verb."""
    del debug, version  # --debug is read in main, which sees errors from anywhere


def main() -> None:
    """Run the command line; what goes wrong is one line on standard error.

    Typer itself ends quietly when it is interrupted (130) or its reader goes away (1).
    """
    logging.basicConfig(format="embedport: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        app()
    except EmbedportError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        _fail(f"this is a bug: {type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(f"embedport: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
