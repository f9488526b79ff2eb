"""`embedport encode`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, require
from ..strict_json import to_json
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
    import numpy as np

    from ..runtimes.bulk import Job
    from ..storage import Place

# Limits that fit into 60 columns: values shown per vector, and texts in the cosine table.
SHOWN = 4
MOST_COMPARED = 7


def encode(
    artifact: ModelArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to embed.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--input",
            help=".txt, .jsonl or .parquet, perhaps in an object store (s3://…, gs://…); or - for "
            "standard input.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="query, document, another prompt's name, or a literal prompt; default: the "
            "model's own."
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Your own instruction for queries.")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="MRL dimension.")] = None,
    precision: Annotated[
        str, typer.Option(help="The vectors' dtype: float32, int8, uint8, binary or ubinary.")
    ] = "float32",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Texts (.txt, .jsonl) to measure the ranges of 8-bit vectors on, once. Without "
            "texts to embed, only that is done (standard input is --input -)."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            "--output",
            help=".npy, .jsonl, .parquet or .arrow; or a folder (vectors/, s3://…/vectors/) for an "
            "--input of any size, written in shards and resumed after a crash.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="A folder's shards: npy, or parquet with ids.")
    ] = "npy",
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Put the texts into .parquet and .arrow, too.")
    ] = False,
    device: DeviceOption = "auto",
    batch_tokens: BatchTokensOption = None,
    max_length: Annotated[int | None, typer.Option(help="Cut texts to this many tokens.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per text.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="For a folder: local, or ray for a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers; default: one per GPU or machine.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output file, or start the folder anew.")
    ] = False,
    task: TaskOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Embed texts.

    Example: embedport encode qwen3-fp32 "What is the capital of China?" --prompt query
    """
    from ..runtimes import Embedder, load
    from ..runtimes.bulk import Job
    from ..runtimes.tables import TABLES
    from ..storage import as_place

    prompt = _choose_prompt(prompt, instruction)
    out = None if output is None else as_place(output)
    source = None if file in (None, "-") else as_place(file)
    if out is not None and _is_folder(out, str(output)):
        if texts or source is None:
            raise InputError(
                f"{out} is a folder of shards, which are made of a file of texts: give --input "
                "FILE; or an output that ends with .npy"
            )
        if calibrate is not None:
            raise InputError(
                f"{out} is a folder of shards: measure ranges first, by `embedport encode ARTIFACT "
                "--calibrate FILE`"
            )
        if as_json:
            raise InputError(f"--json prints, and -o {output} writes a folder: give one of them")
        job = Job(
            model=_absolute(artifact),
            input=source.absolute(),
            output=out.absolute(),
            format=form,
            with_text=with_text,
            prompt=prompt,
            dim=dim,
            precision=precision,
            batch_tokens=batch_tokens,
            device=device,
            max_length=max_length,
            task=check_task(task),
            adapter=None if adapter is None else _absolute(adapter),
        )
        _encode_corpus(job, engine, workers, force)
        return
    if engine != "local" or workers is not None or form != "npy":
        raise InputError(
            "--engine, --workers and --format need an output folder: --output vectors/"
        )
    in_table = out is not None and out.suffix in TABLES
    if out is not None and not in_table and out.suffix not in (".npy", ".jsonl"):
        raise InputError(
            f"{out} should end with .npy, .jsonl, {' or '.join(TABLES)}, or with / for a folder"
        )
    if with_text and not in_table:
        raise InputError("--with-text needs an output that ends with .parquet or .arrow")
    if in_table:  # before the model runs
        require("pyarrow", "arrow")
    if out is not None and as_json:
        raise InputError("--json prints, and -o writes a file: give one of them")
    if isinstance(out, Path):
        check_output(out)
    check_new(out, force)
    only_ranges = calibrate is not None and not texts and file is None
    if only_ranges and (out is not None or as_json):
        raise InputError(
            "--calibrate without texts measures ranges only, and there are no vectors for -o or "
            "--json: give texts, or --input - for standard input"
        )
    inputs, ids = ([], None) if only_ranges else read_texts(texts or [], file, prompt)
    embedder = load(
        artifact, device=device, max_length=max_length, task=check_task(task), adapter=adapter
    )
    if not isinstance(embedder, Embedder):
        raise InputError(f"{artifact} is a reranker: use `embedport rerank`")
    if only_ranges and not embedder.keeps_ranges:
        raise InputError(
            f"{artifact} has no manifest to keep ranges in (a checkpoint, or a folder of the hub's "
            "cache): give the texts to embed in the same command, or export it first"
        )
    if calibrate is not None:
        embedder.check_measured(dim, precision)
        given, _ = read_texts([], calibrate, prompt)
        embedder.calibrate(given, prompt=prompt, batch_tokens=batch_tokens)
        if only_ranges:
            typer.echo(f"{artifact}: ranges measured with {calibrate}", err=True)
            return
    vectors = embedder.encode(
        inputs,
        prompt=prompt,
        dim=dim,
        precision=precision,
        batch_tokens=batch_tokens,
        progress=True,
    )
    if out is not None:
        _write(out, inputs, ids, vectors, with_text=with_text)
        count, width = vectors.shape
        made = count_words(count, "vector")
        typer.echo(f"{out}: {made} of {width}, on {embedder.device}", err=True)
    elif as_json or not sys.stdout.isatty():
        for line in _json_lines(inputs, ids, vectors):
            typer.echo(line)
    else:
        _print(inputs, vectors)


def _is_folder(out: Place, given: str) -> bool:
    """Whether an output is a folder of shards."""
    return given.endswith("/") or not out.suffix or (isinstance(out, Path) and out.is_dir())


def _encode_corpus(job: Job, engine: str, workers: int | None, force: bool) -> None:
    from ..runtimes.bulk import encode_corpus, run_here
    from ..runtimes.ray import run_on_ray

    engines = {"local": run_here, "ray": partial(run_on_ray, workers=workers)}
    if engine not in engines:
        raise InputError(f"engine should be one of {', '.join(engines)}, found {engine!r}")
    if engine == "local" and workers is not None:
        raise InputError("--workers goes with --engine ray")
    index = encode_corpus(job, engines[engine], force=force, progress=True)
    made, shards = count_words(index.rows, "vector"), count_words(len(index.shards), "shard")
    typer.echo(f"{job.output}: {made} of {index.dim} in {shards}", err=True)


def _absolute(model: str) -> str:
    """A folder's absolute path, so that workers find it; a hub id unchanged."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _choose_prompt(prompt: str | None, instruction: str | None) -> str | None:
    if instruction is None:
        return prompt
    if prompt not in (None, "query"):
        raise InputError("--instruction makes a prompt for queries: leave --prompt out")
    from ..texts.prompts import query_prompt

    return query_prompt(instruction)


def _json_lines(texts: list[str], ids: list[str] | None, vectors: np.ndarray) -> Iterator[str]:
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
        own = {} if ids is None else {"id": ids[i]}
        yield to_json(own | {"text": text, "embedding": vector.tolist()})


def _write(
    out: Place, texts: list[str], ids: list[str] | None, vectors: np.ndarray, *, with_text: bool
) -> None:
    """Write vectors in the format of the file's suffix."""
    import numpy as np

    from ..runtimes.tables import make_table, write_table
    from ..storage import writing

    with writing(out) as opened:
        if out.suffix == ".npy":
            np.save(opened, vectors)
        elif out.suffix == ".jsonl":
            opened.writelines(f"{line}\n".encode() for line in _json_lines(texts, ids, vectors))
        else:
            ids = [str(i) for i in range(len(texts))] if ids is None else ids
            write_table(opened, make_table(ids, vectors, texts if with_text else None), out.suffix)


def _print(texts: list[str], vectors: np.ndarray) -> None:
    """Print the first values of each vector and, for a few texts, their cosines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ..texts.ranking import unit

    console = stdout_console()
    is_float = vectors.dtype.kind == "f"
    style = "+.3f" if is_float else "4d"
    table = Table(box=SIMPLE_HEAD, expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("Text", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column(f"First of {vectors.shape[1]} values", no_wrap=True)
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
        values = " ".join(f"{x:{style}}" for x in vector[:SHOWN])
        table.add_row(str(i), Text(" ".join(text.split())), values)
    console.print(table)
    if is_float and 2 <= len(texts) <= MOST_COMPARED:
        vectors = unit(vectors)
        cosines = Table("Cosine", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for i in range(len(texts)):
            cosines.add_column(str(i), justify="right", no_wrap=True)
        for i, row in enumerate(vectors @ vectors.T):
            cosines.add_row(Text(str(i), justify="right"), *(f"{x:.2f}" for x in row))
        console.print(cosines)
