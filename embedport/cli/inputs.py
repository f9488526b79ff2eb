"""Where texts come from: arguments, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..pipeline import TASKS, Task

# The option of commands that take a model.
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="embedding or reranker, for a checkpoint whose files do not tell.",
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
    """The task of the command line.

    Raises:
        InputError: It is none.
    """
    for known in (None, *TASKS):
        if task == known:
            return known
    raise InputError(f"task should be one of {', '.join(TASKS)}, found {task!r}")


def read_texts(arguments: list[str], file: Path | None) -> list[str]:
    """The texts of the command line.

    Args:
        arguments: Texts given as arguments.
        file: A .txt (one text a line) or .jsonl file ({"text": …}); "-" is standard input, one
            text a line, which is also read when there are neither arguments nor a file and it is
            not a terminal.

    Raises:
        InputError: There is no source of texts, or two of them, or a file is not one.
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
                f"{file} names prompts text by text, which `validate` reads; here one prompt is "
                "for all: take them out of the file, and give --prompt"
            )
        return [sample.text for sample in samples]
    if file is None and sys.stdin.isatty():
        raise InputError("no texts: give them as arguments, with --input, or on standard input")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from error
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
