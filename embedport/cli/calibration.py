"""`embedport calibration`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tables import command_words
from .inputs import TaskOption, check_task
from .outputs import stdout_console


def calibration(
    model: Annotated[
        str,
        typer.Argument(
            help="The checkpoint to quantize: a folder or hub id.",
            metavar="MODEL",
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(help="Texts like those to be embedded: .txt, .jsonl, .parquet, or a URI."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .jsonl file to write.")],
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens; default: ten times the inputs of the model's largest matrix."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of texts or pairs, instead of --tokens.")
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="For a reranker: the embedding model that ranks documents for its pairs."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses among texts.")] = 0,
    task: TaskOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Choose calibration texts, or a reranker's pairs, from your corpus.

    Lines {"text": …, "prompt": "query"} mark queries, which a reranker needs.

    Example: embedport calibration Qwen/Qwen3-Embedding-0.6B corpus.jsonl -o texts.jsonl
    """
    from ..calibration import build_calibration

    built = build_calibration(
        model,
        corpus,
        out,
        tokens=tokens,
        count=count,
        embedder=embedder,
        task=check_task(task),
        seed=seed,
        force=force,
        progress=True,
    )
    noun = "texts" if embedder is None else "pairs"
    console = stdout_console()
    console.print(
        f"{out}: {built.texts:,} {noun} of {built.tokens:,} tokens, {built.queries:,} queries",
        soft_wrap=True,
    )
    words = ["embedport", "export", "onnx", model, "-o", "DIR", "--precision", "int4"]
    words += ["--calibration", str(out)]
    console.print(f"Next: {command_words(words)}", soft_wrap=True)
