"""`embedport reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import AdapterOption
from .outputs import check_output, stdout_console

if TYPE_CHECKING:
    from ..demo.samples import Pair, Sample
    from ..spec import Task
    from ..validation.recorded import RecordedReference


def reference(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder or hub id.", show_default=False, metavar="CHECKPOINT")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The output file.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Hub revision.", show_default=False)] = None,
    adapter: AdapterOption = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="embedding or reranker, if the checkpoint does not declare it.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Your texts (.txt, .jsonl) or pairs (.jsonl); default: built-in ones.",
            show_default=False,
        ),
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
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="For a reranker: candidates that replace the set's own.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Cut inputs to this many tokens; default: the checkpoint's limit.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a checkpoint in its own library and record the results that `validate` compares with.

    Copy the file to the artifact's machine: `validate --reference FILE` needs neither torch nor the
    checkpoint. The file holds the texts or pairs.

    Example: embedport reference Qwen/Qwen3-Embedding-0.6B -o qwen3.reference
    """
    from ..validation import record_reference

    check_output(out)
    texts, pairs, kind = _read(checkpoint, revision, task, adapter, file)
    recorded = record_reference(
        checkpoint,
        out,
        texts,
        pairs,
        task=kind,
        adapter=adapter,
        revision=revision,
        device=device,
        max_length=max_length,
        retrieval=_read_set(retrieval, candidates, max_queries),
        force=force,
        progress=True,
    )
    facts = _facts(recorded)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = stdout_console()
    origin = recorded.origin
    noun = "texts" if origin.task == "embedding" else "pairs"
    runs = "; ".join(map(origin.describe, recorded.results))
    console.print(
        f"{out}: {origin.pinned} in {origin.library} {origin.versions[origin.library]}, {runs}, "
        f"{len(recorded.inputs):,} {noun}, {out.stat().st_size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    if recorded.data is not None:
        console.print(
            f"Retrieval on {recorded.data.name}, {len(recorded.data.queries):,} queries: give "
            "validate the same --retrieval",
            soft_wrap=True,
        )
    console.print(f"Next: embedport validate ARTIFACT --reference {out}", soft_wrap=True)


def _read(
    checkpoint: str,
    revision: str | None,
    task: str | None,
    adapter: str | None,
    file: Path | None,
) -> tuple[list[Sample] | None, list[Pair] | None, Task | None]:
    from ..demo.samples import read_pairs, read_samples
    from ..spec import ModelSpec

    kind: Any = task  # checked when the checkpoint is opened
    if file is None:
        return None, None, kind
    spec = ModelSpec.from_checkpoint(checkpoint, revision=revision, task=kind, adapter=adapter)
    if spec.task == "reranker":
        return None, read_pairs(file), kind
    return read_samples(file), None, kind


def _read_set(retrieval: str | None, candidates: Path | None, max_queries: int | None) -> Any:
    from ..beir import read_beir
    from ..errors import InputError

    if retrieval is None:
        if candidates is not None or max_queries is not None:
            raise InputError("--candidates and --max-queries go with --retrieval FOLDER")
        return None
    return read_beir(retrieval, candidates=candidates, max_queries=max_queries)


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
