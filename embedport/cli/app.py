"""The `embedport` command: its verbs, and how errors are reported."""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import EmbedportError
from ..version import __version__
from . import (
    bench,
    calibration,
    check,
    demo,
    deploy,
    encode,
    export,
    inspect,
    push,
    quantize,
    reference,
    rerank,
    serve,
    tensorrt,
    validate,
)
from .flags import FlagFormatter, with_flags

# What a device without room gives. Our own files are written by functions that name them.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What stands around a name in JSON, HTML and messages.
AROUND_NAMES = re.compile(r'["<>\n]')


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM; typer by itself would exit without a message."""


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as from `docker stop`: it ends a verb as Ctrl-C does, and nothing is left behind."""


def _terminate(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    # A TensorRT build has its own handler: an exception must not propagate through the library.
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, frame)
    else:
        raise _TerminatedError


class StandardError(logging.StreamHandler):
    """Prints to standard error of that moment: a progress bar puts in its own, and goes on below.

    A StreamHandler keeps the one that it was made with, and writes into the bar's line. A warning
    is printed once, since a command may open the same folder several times; errors, those of a
    server's requests, each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        if record.levelno == logging.WARNING:
            if (message := record.getMessage()) in self._warnings:
                return
            self._warnings.add(message)
        self.stream = sys.stderr
        super().emit(record)


class _Verbs(TyperGroup):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Put `export` first: it is a group, which typer lists after the commands."""
        return sorted(super().list_commands(ctx), key=lambda name: name != "export")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also accept `--debug` at the end, where it is easily added to a failed command."""
        if args and args[-1] == "--debug" and "--" not in args:
            args = ["--debug", *args[:-1]]
        try:
            return super().parse_args(ctx, args)
        except KeyboardInterrupt as error:
            raise _StoppedError from error

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        previous = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _StoppedError from error
        finally:
            signal.signal(signal.SIGTERM, previous)


app = typer.Typer(
    name="embedport",
    cls=_Verbs,
    help="Take a Qwen3-Embedding or Qwen3-Reranker checkpoint to ONNX, run it, and prove how close "
    "it stays to the reference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
export_app = typer.Typer(help="Turn a checkpoint into an artifact.", no_args_is_help=True)
export_app.command("onnx")(export.export_onnx)
export_app.command("tensorrt")(tensorrt.export_tensorrt)
app.add_typer(export_app, name="export")
app.command("quantize")(quantize.quantize)
app.command("calibration")(calibration.calibration)
app.command("encode")(encode.encode)
app.command("rerank")(rerank.rerank)
app.command("serve")(serve.serve)
deploy_app = typer.Typer(help="Make what other software deploys.", no_args_is_help=True)
deploy_app.command("triton")(deploy.triton)
deploy_app.command("docker")(deploy.docker)
deploy_app.command("vespa")(deploy.vespa)
app.add_typer(deploy_app, name="deploy")
app.command("check")(check.check)
app.command("push")(push.push)
app.command("validate")(validate.validate)
app.command("reference")(reference.reference)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
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
    del debug, version  # `_fail` reads --debug from sys.argv, to cover all errors


def main() -> None:
    """Run the command line; an error prints one line on standard error.

    If the reader of standard output goes away, typer exits silently with code 1.
    """
    open_closed_streams()
    _allow_any_terminal()
    command = typer.main.get_command(app)
    handler = StandardError()
    handler.setFormatter(FlagFormatter("embedport: %(message)s", command))
    handler.addFilter(_is_not_printed_yet)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        command()
    except _StoppedError as error:
        if isinstance(error.__cause__, _TerminatedError):
            _fail("terminated", 143)
        _fail("interrupted", 130)
    except EmbedportError as error:
        _fail(with_flags(str(error), command), error.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and error.filename is not None:
            _fail(f"{error.filename}: the name is too long for this file system", 2)
        if error.errno not in FULL or error.filename is not None:
            _fail_by_a_bug(error)
        _fail(f"the output cannot be written: {error.strerror}", 2)
    except Exception as error:
        if (name := _name_without_utf8(error)) is not None:
            advice = "" if _hint() else "; rename it"  # elsewhere it may be UTF-8
            _fail(f"a file's or folder's name is not UTF-8, and has to be: {name!r}{advice}", 2)
        _fail_by_a_bug(error)


def _is_not_printed_yet(record: logging.LogRecord) -> bool:
    """Leave out records of libraries that print theirs themselves, as huggingface_hub does."""
    return not logging.getLogger(record.name.partition(".")[0]).handlers


def open_closed_streams() -> None:
    """Open nothing in place of streams that were closed before the start, as a daemon's may be.

    A file would get the number of such a stream, and the messages of libraries in C with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            flags, mode = (os.O_WRONLY, "w") if number else (os.O_RDONLY, "r")
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))


def _name_without_utf8(error: Exception) -> str | None:
    """The name of a file that no text can hold: Python reads its bytes as lone surrogates."""
    if not isinstance(error, UnicodeEncodeError):
        return None
    text, place = error.object, error.start
    if not "\udc80" <= text[place] <= "\udcff":
        return None
    before, after = AROUND_NAMES.split(text[:place])[-1], AROUND_NAMES.split(text[place:])[0]
    return before + after


def _allow_any_terminal() -> None:
    """Escape, as JSON does, what standard output's encoding lacks: a terminal without UTF-8."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and codecs.lookup(stdout.encoding).name != "utf-8":
        codecs.register_error("json", _escape)
        stdout.reconfigure(errors="json")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _fail_by_a_bug(error: Exception) -> None:
    _fail(f"this is a bug: {type(error).__name__}: {error} (run it again with --debug)", 1)


def _fail(message: str, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    hint = _hint() if code <= 2 else ""  # above, it was stopped
    print(f"embedport: {' '.join(message.split())}{hint}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _hint() -> str:
    """Advice where this locale's encoding may have garbled an argument or a folder's name."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8" or all(map(str.isascii, (*sys.argv, os.environ.get("PWD", "")))):
        return ""
    return f" (Python reads arguments and names as {encoding} here: set PYTHONUTF8=1)"
