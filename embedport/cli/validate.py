"""`embedport validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .inputs import (
    CandidatesOption,
    DeviceOption,
    MaxQueriesOption,
    ModelArgument,
    RetrievalOption,
    TaskOption,
    check_task,
    read_own,
    read_set,
)
from .outputs import check_output, stderr_console, stdout_console, write_text

if TYPE_CHECKING:
    from ..checkpoint.spec import Task


def validate(
    artifact: ModelArgument,
    reference: Annotated[
        str,
        typer.Option(
            help="The checkpoint it was made from (a folder or hub id), or a file that "
            "`embedport reference` wrote."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="The reference's hub revision.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A LoRA adapter's folder, or hub id, to merge into the reference."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Your texts (.txt, .jsonl) or pairs (.jsonl); default: those of a recorded "
            "reference, or built-in ones.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    min_cosine: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.")
    ] = None,
    max_score_difference: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.")
    ] = None,
    retrieval: RetrievalOption = None,
    mteb: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…",
            help="Also run MTEB's tasks on both sides, such as STS17,NFCorpus,SciFact.",
        ),
    ] = None,
    max_queries: MaxQueriesOption = None,
    max_ndcg_loss: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.")
    ] = None,
    candidates: CandidatesOption = None,
    save_run: Annotated[
        Path | None,
        typer.Option(help="Write an embedder's 50 best documents per query, for --candidates."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report: .html with charts, .json or .md.")
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Write all figures into the manifest and the model card.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    task: TaskOption = None,
) -> None:
    """Compare an artifact with its checkpoint in its own library; exit code 1 if a gate fails.

    Example: embedport validate qwen3-fp32 --reference Qwen/Qwen3-Embedding-0.6B
    """
    from ..runtimes import read_info
    from ..validation import validate as run
    from ..validation.preconditions import find_recorded

    check_output(report, ".html", ".json", ".md")
    check_output(save_run)
    record_folder = find_recorded(artifact) if record else None
    checked_task = check_task(task)

    def find_task() -> Task:
        return read_info(artifact, checked_task).task

    if retrieval is None and mteb is None and max_ndcg_loss is not None:
        raise InputError("--max-ndcg-loss goes with --retrieval FOLDER or --mteb TASK,…")
    texts, pairs = read_own(file, find_task)
    data = read_set(retrieval, candidates, max_queries, find_task)
    result = run(
        artifact,
        reference,
        texts,
        pairs,
        revision=revision,
        adapter=adapter,
        device=device,
        min_cosine=min_cosine,
        max_score_difference=max_score_difference,
        retrieval=data,
        mteb=None if mteb is None else [name.strip() for name in mteb.split(",") if name.strip()],
        max_ndcg_loss=max_ndcg_loss,
        save_run=save_run,
        page=report if report is not None and report.suffix == ".html" else None,
        command=["embedport", *sys.argv[1:]],
        record=record_folder is not None,
        progress=True,
        task=checked_task,
    )
    if report is not None and report.suffix != ".html":
        write_text(report, result.to_json() if report.suffix == ".json" else result.to_markdown())
    results, messages = stdout_console(), stderr_console()
    if as_json:
        typer.echo(result.to_json())
    else:
        results.print(*result.short_tables())
    if record_folder is not None:
        messages.print(f"Recorded in {record_folder}: embedport.json and README.md", soft_wrap=True)
    if report is not None:
        messages.print(f"Report: {report}", soft_wrap=True)
    elif record_folder is None and not as_json:
        messages.print("All figures: --report FILE.html, .md or .json", soft_wrap=True)
    # Last, where a terminal shows it. Lines are broken for a terminal only.
    if not as_json:
        results.print(*result.conclusion(), sep="\n", soft_wrap=not results.is_terminal)
    if as_json or not results.is_terminal:
        messages.print(result.verdict(), soft_wrap=True)
    raise typer.Exit(0 if result.passed else 1)
