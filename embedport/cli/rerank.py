"""`embedport rerank`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..strict_json import to_json, write_jsonl
from ..tables import count_words
from .inputs import (
    AdapterOption,
    BatchTokensOption,
    DeviceOption,
    ModelArgument,
    TaskOption,
    check_task,
    read_texts,
)
from .outputs import check_new, check_output, stdout_console

if TYPE_CHECKING:
    from ..runtimes import Ranked


def rerank(
    artifact: ModelArgument,
    query: Annotated[str, typer.Argument(help="The query.")],
    documents: Annotated[list[str] | None, typer.Argument(help="Documents to rank.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--input", help=".txt, .jsonl or .parquet; or - for standard input."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Show only the best so many.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Your own instruction: what is relevant.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help=".jsonl.")] = None,
    device: DeviceOption = "auto",
    batch_tokens: BatchTokensOption = None,
    max_length: Annotated[int | None, typer.Option(help="Cut pairs to this many tokens.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per document.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    task: TaskOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Order documents by relevance to a query.

    Example: embedport rerank reranker-fp32 "What is the capital of China?" "Beijing is." "Paris."
    """
    from ..runtimes import Reranker, load

    check_output(out, ".jsonl")
    if out is not None and as_json:
        raise InputError("--json prints, and -o writes a file: give one of them")
    check_new(out, force)
    inputs, ids = read_texts(documents or [], file)
    reranker = load(
        artifact, device=device, max_length=max_length, task=check_task(task), adapter=adapter
    )
    if not isinstance(reranker, Reranker):
        raise InputError(f"{artifact} is an embedding model: use `embedport encode`")
    ranking = reranker.rank(
        query,
        inputs,
        top_k=top_k,
        instruction=instruction,
        batch_tokens=batch_tokens,
        progress=True,
    )
    if out is not None:
        write_jsonl(out, _rows(ranking, ids))
        ranked_words = count_words(len(ranking), "document")
        typer.echo(f"{out}: {ranked_words}, on {reranker.device}", err=True)
    elif as_json or not sys.stdout.isatty():
        for row in _rows(ranking, ids):
            typer.echo(to_json(row))
    else:
        _print(ranking, ids)


def _rows(ranking: list[Ranked], ids: list[str] | None) -> Iterator[dict[str, Any]]:
    for ranked in ranking:
        yield ({} if ids is None else {"id": ids[ranked.index]}) | asdict(ranked)


def _print(ranking: list[Ranked], ids: list[str] | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True)
    table.add_column("Rank", justify="right", no_wrap=True)
    table.add_column("Score", justify="right", no_wrap=True)
    name = "#" if ids is None else "Id"
    table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column("Document", overflow="ellipsis", no_wrap=True, ratio=1)
    for rank, ranked in enumerate(ranking, 1):
        document = Text(" ".join(ranked.document.split()))
        id = Text(str(ranked.index) if ids is None else ids[ranked.index])
        table.add_row(str(rank), f"{ranked.score:.4f}", id, document)
    stdout_console().print(table)
