"""Inputs of the verbs: shared options, and texts from arguments, a file or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..pipeline import TASKS, Task

# For every command that opens a model.
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="embedding or reranker, if the checkpoint does not declare it.",
        show_default=False,
    ),
]


AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="A LoRA adapter's folder, or hub id, to merge into the checkpoint's weights.",
        show_default=False,
    ),
]


def check_task(task: str | None) -> Task | None:
    """Check --task.

    Raises:
        InputError: The task is unknown.
    """
    for valid in (None, *TASKS):
        if task == valid:
            return valid
    raise InputError(f"task should be one of {', '.join(TASKS)}, found {task!r}")


def read_texts(arguments: list[str], file: Path | None) -> list[str]:
    """Read the texts of the command line.

    Args:
        arguments: Texts given as arguments.
        file: A .txt file (one text per line) or .jsonl file ({"text": …}); "-" is standard input,
            one text per line. Standard input is also read if there are neither arguments nor a file
            and it is not a terminal.

    Raises:
        InputError: There is no source of texts, or there are two, or the input is unreadable.
    """
    if arguments and file is not None:
        raise InputError("give texts as arguments or with --input, not both")
    if arguments:
        return arguments
    if file is not None and str(file) != "-":
        from ..demo.samples import read_samples

        samples = read_samples(file)
        if any(sample.prompt != "document" for sample in samples):
            raise InputError(
                f"{file} has a prompt for each text, which only `validate` reads; here all texts "
                "share one: take the prompts out of the file, and give --prompt"
            )
        return [sample.text for sample in samples]
    if file is None and sys.stdin.isatty():
        raise InputError("no texts: give them as arguments, with --input, or on standard input")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from error
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
