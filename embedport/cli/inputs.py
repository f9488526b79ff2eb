"""Inputs of the verbs: shared options, and texts from arguments, a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.pipeline import TASKS, Task
from ..errors import InputError

if TYPE_CHECKING:
    from ..texts.beir import RetrievalSet
    from ..texts.samples import Pair, Sample

# Text: a hub id as a path would have a backslash on Windows.
ModelArgument = Annotated[
    str, typer.Argument(help="An artifact's or checkpoint's folder, or a hub id.")
]
CheckpointArgument = Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.")]
ArtifactArgument = Annotated[str, typer.Argument(help="An artifact's folder, or a hub id.")]
ArtifactOut = Annotated[Path, typer.Option("-o", "--out", help="The artifact's folder.")]
# For every command that opens a model.
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="embedding or reranker, if the checkpoint does not declare it."),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="A hub revision.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or tensorrt (graphs only).")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Most tokens per batch; by default as many as keep the device busy.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would be done, its size, memory and time; write nothing."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="A LoRA adapter's folder, or hub id, to merge into the checkpoint's weights.",
    ),
]


# For the commands that measure retrieval.
RetrievalOption = Annotated[
    str | None,
    typer.Option(
        "--retrieval", help="Also measure retrieval: a folder in BEIR layout, or builtin."
    ),
]
MaxQueriesOption = Annotated[
    int | None, typer.Option("--max-queries", help="Use only so many queries of the retrieval set.")
]
CandidatesOption = Annotated[
    Path | None,
    typer.Option("--candidates", help="For a reranker: candidates that replace the set's own."),
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


def read_own(
    file: Path | None, find_task: Callable[[], Task]
) -> tuple[list[Sample] | None, list[Pair] | None]:
    """Read --input of the commands that take texts or pairs, as the model's task is.

    Args:
        file: The file; None for the built-in inputs.
        find_task: Finds the model's task; called only if there is a file.

    Returns:
        (texts, pairs): one of them, or neither without a file.

    Raises:
        InputError: The file is missing, empty or malformed.
    """
    if file is None:
        return None, None
    from ..texts.samples import read_pairs, read_samples

    if find_task() == "reranker":
        return None, read_pairs(file)
    return read_samples(file), None


def read_set(
    retrieval: str | None,
    candidates: Path | None,
    max_queries: int | None,
    find_task: Callable[[], Task],
) -> RetrievalSet | None:
    """Read --retrieval, with --candidates and --max-queries.

    Args:
        retrieval: A folder in BEIR layout, or "builtin"; None for no set.
        candidates: A reranker's candidates, instead of the set's own.
        max_queries: The number of queries to use.
        find_task: Finds the model's task; called only if there are candidates.

    Raises:
        InputError: The set is incomplete; or there are candidates or a number of queries without a
            set, or candidates for an embedder.
    """
    if retrieval is None:
        if candidates is not None or max_queries is not None:
            raise InputError("--candidates and --max-queries go with --retrieval FOLDER")
        return None
    from ..texts.beir import read_beir

    if candidates is not None and find_task() == "embedding":
        raise InputError(
            "--candidates are for rerankers: an embedding model searches all documents"
        )
    return read_beir(retrieval, candidates=candidates, max_queries=max_queries)


def read_texts(
    arguments: list[str], file: str | Path | None, prompt: str | None = "document"
) -> tuple[list[str], list[str] | None]:
    """Read the texts of the command line.

    Args:
        arguments: Texts given as arguments.
        file: A file of `embedport.texts.text_files`, perhaps in an object store; "-" is standard
            input, one text per line. Standard input is also read if there are neither arguments nor
            a file and it is not a terminal.
        prompt: The prompt of all texts; a row of a file may name no other.

    Returns:
        The texts, and their ids; None for those of a pipe or of no file.

    Raises:
        InputError: There is no source of texts, or there are two, or the input is unreadable or
            empty.
    """
    if arguments and file is not None:
        raise InputError("give texts as arguments or with --input, not both")
    if arguments:
        return arguments, None
    if file is not None and str(file) != "-":
        from ..storage import as_place
        from ..texts.corpus import check_prompt
        from ..texts.samples import read_samples
        from ..texts.text_files import read_rows

        place = as_place(file) if isinstance(file, str) else file
        if isinstance(place, Path) and place.is_fifo():  # it can be read once only, as lines
            samples = read_samples(place, prompt)
            for number, sample in enumerate(samples, 1):
                check_prompt(f"{file}, text {number}", sample.prompt, prompt)
            return [sample.text for sample in samples], None
        rows = read_rows(place, prompt)
        return [row.text for row in rows], [row.id for row in rows]
    if file is None and sys.stdin.isatty():
        raise InputError("no texts: give them as arguments, with --input, or on standard input")
    from ..texts.corpus import note_blank_lines

    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from error
    lines = text.replace("\r\n", "\n").split("\n")
    texts = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:  # as a file without texts: the command before the pipe may have failed
        raise InputError("standard input holds no text")
    note_blank_lines("standard input", len(texts), texts[-1][0])
    return [line for _, line in texts], None
