"""`embedport encode`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .inputs import read_texts
from .outputs import check_suffix, stdout_console, write_jsonl, write_npy

if TYPE_CHECKING:
    import numpy as np

MOST_COMPARED = 8


def encode(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.", show_default=False)],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts to embed.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--input", help=".txt, .jsonl, or - for standard input.", show_default=False),
    ] = None,
    prompt: Annotated[str, typer.Option(help="query, document, or a literal prompt.")] = "document",
    instruction: Annotated[
        str | None, typer.Option(help="Your own instruction for queries.", show_default=False)
    ] = None,
    dim: Annotated[int | None, typer.Option(help="MRL dimension.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help=".npy or .jsonl.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or tensorrt.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch at most.")] = 4096,
    max_length: Annotated[
        int | None, typer.Option(help="Cut texts to so many tokens.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a text.")] = False,
) -> None:
    """Embed texts.

    Example: embedport encode qwen3-fp32 "What is the capital of China?" --prompt query
    """
    from ..prompts import query_prompt
    from ..runtimes import Embedder, load

    check_suffix(out, ".npy", ".jsonl")
    if instruction is not None:
        if prompt != "document":
            raise InputError("give --prompt or --instruction, not both")
        prompt = query_prompt(instruction)
    inputs = read_texts(texts or [], file)
    embedder = load(artifact, device=device, max_length=max_length)
    if not isinstance(embedder, Embedder):
        raise InputError(f"{artifact} is a reranker: use `embedport rerank`")
    vectors = embedder.encode(
        inputs, prompt=prompt, dim=dim, batch_tokens=batch_tokens, progress=True
    )
    rows = ({"text": t, "embedding": v.tolist()} for t, v in zip(inputs, vectors, strict=True))
    if out is not None and out.suffix == ".npy":
        write_npy(out, vectors)
    elif out is not None:
        write_jsonl(out, rows)
    elif as_json or not sys.stdout.isatty():
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
        return
    else:
        _print(inputs, vectors)
    if out is not None:
        count, width = vectors.shape
        typer.echo(f"{out}: {count:,} vectors of {width}, on {embedder.device}", err=True)


def _print(texts: list[str], vectors: np.ndarray) -> None:
    """The first values of each vector, and for a few texts how alike they are."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("Text", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column(f"First of {vectors.shape[1]} values", no_wrap=True)
    compared = 2 <= len(texts) <= MOST_COMPARED
    if compared:
        table.add_column("Cosine to each", no_wrap=True)
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
        cells = [str(i), Text(" ".join(text.split())), " ".join(f"{x:+.3f}" for x in vector[:4])]
        if compared:
            cells.append(" ".join(f"{x:+.2f}" for x in vectors @ vector))
        table.add_row(*cells)
    stdout_console().print(table)
