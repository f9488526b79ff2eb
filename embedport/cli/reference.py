"""`embedport reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tables import INPUT, command_words, count_words
from .inputs import (
    AdapterOption,
    CandidatesOption,
    MaxQueriesOption,
    RetrievalOption,
    TaskOption,
    check_task,
    read_own,
    read_set,
)
from .outputs import check_output, stdout_console

if TYPE_CHECKING:
    from ..checkpoint.spec import Task
    from ..validation.recorded import RecordedReference


def reference(
    checkpoint: Annotated[str, typer.Argument(help="A folder or hub id.", metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The output file.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    adapter: AdapterOption = None,
    task: TaskOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input", help="Your texts (.txt, .jsonl) or pairs (.jsonl); default: built-in ones."
        ),
    ] = None,
    retrieval: RetrievalOption = None,
    max_queries: MaxQueriesOption = None,
    candidates: CandidatesOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(help="Cut inputs to this many tokens; default: the checkpoint's limit."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a checkpoint in its own library and record the results that `validate` compares with.

    The file holds the texts or pairs. `validate --reference FILE` runs anywhere without torch.

    Example: embedport reference Qwen/Qwen3-Embedding-0.6B -o qwen3.reference
    """
    from ..checkpoint.spec import ModelSpec
    from ..validation import record_reference

    check_output(out)
    checked_task = check_task(task)

    def find_task() -> Task:
        return ModelSpec.from_checkpoint(
            checkpoint, revision=revision, task=checked_task, adapter=adapter
        ).task

    texts, pairs = read_own(file, find_task)
    recorded = record_reference(
        checkpoint,
        out,
        texts,
        pairs,
        task=checked_task,
        adapter=adapter,
        revision=revision,
        device=device,
        max_length=max_length,
        retrieval=read_set(retrieval, candidates, max_queries, find_task),
        force=force,
        progress=True,
    )
    facts = _facts(recorded)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = stdout_console()
    origin = recorded.origin
    noun = INPUT[origin.task]
    runs = "; ".join(map(origin.describe, recorded.results))
    console.print(
        f"{out}: {origin.pinned} in {origin.library} {origin.versions[origin.library]}, {runs}, "
        f"{count_words(len(recorded.inputs), noun)}, {out.stat().st_size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    if recorded.data is not None:
        queries = count_words(len(recorded.data.queries), "query", "queries")
        console.print(
            f"Retrieval on {recorded.data.name}, {queries}: give validate the same --retrieval",
            soft_wrap=True,
        )
    quoted = command_words([str(out)])
    console.print(f"Next: embedport validate ARTIFACT --reference {quoted}", soft_wrap=True)


def _facts(recorded: RecordedReference) -> dict[str, Any]:
    origin = recorded.origin
    return {
        "file": str(recorded.path),
        "bytes": recorded.path.stat().st_size,
        "reference": origin.pinned,
        "task": origin.task,
        "library": origin.library,
        "versions": dict(origin.versions),
        "runs": [origin.describe(name) for name in recorded.results],
        "inputs": len(recorded.inputs),
        "tokens": sum(map(len, recorded.rows)),
        "files": dict(origin.files),
        "retrieval": recorded.data and recorded.data.name,
    }
