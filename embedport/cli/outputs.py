"""Outputs of the verbs: files written completely or not at all, JSON, and tables."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import InputError
from ..tables import command_words, size_words

if TYPE_CHECKING:
    from rich.console import Console

    from ..artifact.folder import Artifact
    from ..exporters.estimate import Estimate
    from ..exporters.provenance import Progress
    from ..storage import Place

STAGES = {
    "calibrate": "Calibrating",
    "search": "Searching",
    "quantize": "Quantizing",
    "write": "Writing",
    "verify": "Verifying",
    "check": "Checking",
}


def stderr_console() -> Console:
    """A console for messages, on standard error.

    Rich's markup is off, because paths and texts may contain brackets.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def stdout_console() -> Console:
    """A console for results, on standard output; markup is off too."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


@contextlib.contextmanager
def stages() -> Generator[Progress]:
    """A progress callback that draws one bar per stage on a terminal."""
    console = stderr_console()
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:11}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # TensorRT's builder reports its own phases, which STAGES does not have.
                tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def print_written(artifact: Artifact, seconds: float, *facts: str) -> None:
    """Print what was written: folder, task, precision, further facts, size and time."""
    from rich.text import Text

    manifest, size = artifact.manifest, size_words(artifact.size)
    words = ", ".join([manifest.task, manifest.precision, *facts, size, f"in {seconds:.1f} s"])
    line = Text.assemble((str(artifact.folder), "bold"), f": {words}")
    stdout_console().print(line, soft_wrap=True)


def echo_written(artifact: Artifact, seconds: float, **facts: object) -> None:
    """Print the same as JSON.

    Args:
        artifact: What was written.
        seconds: How long it took.
        facts: Further facts.
    """
    manifest = artifact.manifest
    common = {"artifact": str(artifact.folder), "task": manifest.task}
    size = {"bytes": artifact.size, "seconds": round(seconds, 3)}
    typer.echo(json.dumps(common | facts | size))


def validate_command(artifact: Artifact) -> str:
    """The command that compares an artifact with the checkpoint that it was made from."""
    options = artifact.manifest.source.options
    return command_words(["embedport", "validate", str(artifact.folder), *options])


def print_estimate(estimate: Estimate, *, as_json: bool) -> None:
    """Print a run that was planned and not done."""
    if as_json:
        typer.echo(json.dumps(asdict(estimate)))
        return
    console, minutes = stdout_console(), estimate.seconds / 60
    for step in estimate.steps:
        console.print(step, soft_wrap=True)
    size = "as the search finds" if estimate.bytes is None else size_words(estimate.bytes)
    length = f"{minutes:.0f} minutes" if minutes >= 2 else f"{estimate.seconds:.0f} s"
    memory = size_words(estimate.memory_bytes)
    console.print(f"Weights: {size}. Memory: about {memory}. Time: about {length} on this machine.")
    console.print("Nothing was written.")


def check_output(path: Path | None, *suffixes: str) -> None:
    """Check an output file's path before any work is done.

    Raises:
        InputError: The path has none of the given suffixes, is a folder, or lies in a folder that
            does not exist or is not writable.
    """
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{path} should end with {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        which = f"{path} is a folder" if path.is_dir() else f"{path.parent} is read-only"
        raise InputError(f"{path} cannot be written: {which}")


def check_new(place: Place | None, force: bool) -> None:
    """Refuse to replace a file of results, which may have taken hours.

    Raises:
        InputError: There is a file and `force` is not given, or the reverse; or the place cannot
            be reached.
    """
    if place is None:
        if force:
            raise InputError("`force` replaces an output: give --output")
        return
    try:
        exists = place.exists()
    except OSError as error:  # an object store that is not there
        raise InputError(f"{place} cannot be written: {error}") from error
    if exists and not force:
        raise InputError(f"{place} exists; choose another place or replace it with `force`")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    from ..files import written

    with written(path) as file:
        file.write(text.encode("utf-8"))
