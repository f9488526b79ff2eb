"""`embedport validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .inputs import TaskOption, check_task
from .outputs import check_output, stderr_console, stdout_console, write_text

if TYPE_CHECKING:
    from ..beir import RetrievalSet
    from ..demo.samples import Pair, Sample
    from ..spec import Task


def validate(
    artifact: Annotated[
        Path,
        typer.Argument(
            help="An artifact's or checkpoint's folder, or a hub id.", show_default=False
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            help="The checkpoint it was made from (a folder or hub id), or a file that "
            "`embedport reference` wrote.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="The reference's hub revision.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="A LoRA adapter's folder, or hub id, to merge into the reference.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Your texts (.txt, .jsonl) or pairs (.jsonl); default: those of a recorded "
            "reference, or built-in ones.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or tensorrt (graphs only).")
    ] = "auto",
    min_cosine: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.", show_default=False)
    ] = None,
    max_score_difference: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.", show_default=False)
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(
            help="Also measure retrieval: a folder in BEIR layout, or builtin.",
            show_default=False,
        ),
    ] = None,
    max_queries: Annotated[
        int | None,
        typer.Option(help="Use only so many queries of the retrieval set.", show_default=False),
    ] = None,
    max_ndcg_loss: Annotated[
        float | None, typer.Option(help="Replaces the precision's limit.", show_default=False)
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="For a reranker: candidates that replace the set's own.", show_default=False
        ),
    ] = None,
    save_run: Annotated[
        Path | None,
        typer.Option(
            help="Write an embedder's 50 best documents per query, for --candidates.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a report: .html with charts, .json or .md.", show_default=False),
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Write the figures into the manifest and the model card.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    task: TaskOption = None,
) -> None:
    """Compare an artifact with its checkpoint in its own library; exit code 1 if a gate fails.

    Example: embedport validate qwen3-fp32 --reference Qwen/Qwen3-Embedding-0.6B
    """
    from ..validation import validate as run
    from ..validation.recording import find_recorded

    check_output(report, ".html", ".json", ".md")
    check_output(save_run)
    record_folder = find_recorded(artifact) if record else None
    checked_task = check_task(task)
    texts, pairs = _read(artifact, file, checked_task)
    data = _read_set(artifact, checked_task, retrieval, candidates, max_queries, max_ndcg_loss)
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
    if as_json:
        typer.echo(result.to_json())
    else:
        stdout_console().print(result)
    if record_folder is not None:
        stderr_console().print(
            f"Recorded in {record_folder}: embedport.json and README.md", soft_wrap=True
        )
    raise typer.Exit(0 if result.passed else 1)


def _read(
    artifact: Path, file: Path | None, task: Task | None
) -> tuple[list[Sample] | None, list[Pair] | None]:
    if file is None:
        return None, None
    from ..demo.samples import read_pairs, read_samples
    from ..runtimes import read_facts

    if read_facts(artifact, task).task == "reranker":
        return None, read_pairs(file)
    return read_samples(file), None


def _read_set(
    artifact: Path,
    task: Task | None,
    retrieval: str | None,
    candidates: Path | None,
    max_queries: int | None,
    max_ndcg_loss: float | None,
) -> RetrievalSet | None:
    if retrieval is None:
        if candidates is not None or max_queries is not None or max_ndcg_loss is not None:
            raise InputError(
                "--candidates, --max-queries and --max-ndcg-loss go with --retrieval FOLDER"
            )
        return None
    from ..beir import read_beir
    from ..runtimes import read_facts

    if candidates is not None and read_facts(artifact, task).task == "embedding":
        raise InputError(
            "--candidates are for rerankers: an embedding model searches all documents"
        )
    return read_beir(retrieval, candidates=candidates, max_queries=max_queries)
