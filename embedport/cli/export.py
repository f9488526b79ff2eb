"""`embedport export onnx`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tables import command_words
from .inputs import (
    AdapterOption,
    ArtifactOut,
    CheckpointArgument,
    DryRunOption,
    RevisionOption,
    TaskOption,
)
from .outputs import (
    echo_written,
    print_estimate,
    print_written,
    stages,
    stdout_console,
    validate_command,
)

if TYPE_CHECKING:
    from ..artifact.folder import Artifact


def export_onnx(
    checkpoint: CheckpointArgument,
    out: ArtifactOut,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, int8-weight, int4, fp8 or auto.")
    ] = "fp32",
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="Arithmetic of a quantized graph: fp32 for CPUs, bf16 for GPUs; default: fp32, "
            "except for fp8."
        ),
    ] = None,
    dialect: Annotated[
        str,
        typer.Option(help="ort (onnxruntime's fused operators) or standard (ONNX opset 23 only)."),
    ] = "ort",
    output: Annotated[
        str, typer.Option(help="pooled, or hidden: last_hidden_state for sentence-transformers.")
    ] = "pooled",
    dim: Annotated[int | None, typer.Option(help="Bake in an MRL dimension.")] = None,
    task: TaskOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    max_length: Annotated[int | None, typer.Option(help="Cut texts to this many tokens.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Your texts (.txt, .jsonl) or pairs (.jsonl) for fp16, gptq, awq, auto; default: "
            "built-in ones, on a CPU 8,192 tokens of them; builtin: all of them."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where gptq, gptaq and awq run: cpu, or cuda (in torch).")
    ] = "cpu",
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Quantization algorithm: rtn, mse, gptq, gptaq, awq, smoothquant, awq+gptaq, …; "
            "default: gptaq for int4 (rerankers: awq+gptq), awq+gptq for auto, otherwise rtn."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="For int4: round to nearest; seconds, not minutes, and worse."),
    ] = False,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate", help="Rotate outliers away before quantizing; default for int8."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale: 32, 64 or 128; for int8-weight and int4."),
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="Bits of the embedding table: 4 or 8.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A recipe.json or an artifact's embedport.json to follow; give the same "
            "--calibration."
        ),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="For auto: smallest cosine of any text; 0.999 by default.")
    ] = None,
    max_ndcg_loss: Annotated[
        float | None, typer.Option(help="For auto: largest loss of nDCG@10 on --retrieval.")
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(help="For auto: a retrieval set: a folder in BEIR layout, or builtin."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="For auto: most bytes of the weights.")
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option(help="For auto: the same, as bits for each weight, scales included."),
    ] = None,
    dry_run: DryRunOption = False,
    consumers: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="Also write what this software opens: sentence-transformers, transformers.js, "
            "tei, fastembed, triton, older-onnxruntime or openvino. May be repeated.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export a checkpoint to an ONNX artifact.

    Example: embedport export onnx Qwen/Qwen3-Embedding-0.6B -o qwen3-fp32
    """
    from ..exporters import export as run
    from ..exporters.onnx import Options, estimate_onnx

    options = Options(
        precision=precision,
        arithmetic=arithmetic,
        dialect=dialect,
        outputs=output,
        dim=dim,
        max_length=max_length,
        calibration=calibration,
        device=device,
        algorithm=algorithm,
        fast=fast,
        rotate=rotate,
        group_size=group_size,
        embedding_bits=embedding_bits,
        recipe=recipe,
        min_cosine=min_cosine,
        max_ndcg_loss=max_ndcg_loss,
        retrieval=retrieval,
        max_bytes=max_bytes,
        average_bits=average_bits,
        consumers=consumers or (),
    )
    places: dict[str, Any] = {
        "revision": revision,
        "task": task,
        "adapter": adapter,
        "force": force,
    }
    if dry_run:
        print_estimate(estimate_onnx(checkpoint, out, options, **places), as_json=as_json)
        return
    start = time.monotonic()
    with stages() as progress:
        artifact = run(checkpoint, out, **vars(options), **places, progress=progress)
    seconds = time.monotonic() - start
    graph = artifact.manifest.graph
    assert graph is not None
    if as_json:
        facts = {"dialect": graph.dialect, "kept_in_fp32": graph.kept_in_fp32}
        echo_written(artifact, seconds, precision=artifact.manifest.precision, **facts)
    else:
        _print(artifact, seconds)


def _print(artifact: Artifact, seconds: float) -> None:
    manifest, graph, console = artifact.manifest, artifact.manifest.graph, stdout_console()
    assert graph is not None
    print_written(artifact, seconds, f"{graph.dialect} dialect")
    if manifest.precision in ("fp16", "bf16"):
        fp32_parts = ", ".join(graph.kept_in_fp32) or "nothing"
        console.print(f"Kept in fp32: {fp32_parts}")
    verb = "encode" if manifest.task == "embedding" else "rerank"
    console.print("Next:")
    texts = '"What is the capital of China?"'
    texts += ' "The capital of China is Beijing."' if verb == "rerank" else " --prompt query"
    folder = command_words([str(artifact.folder)])
    for command in (f"embedport {verb} {folder} {texts}", validate_command(artifact)):
        console.print(f"  {command}", soft_wrap=True)
    if "ORIGINAL" in manifest.source.options:
        words = f"ORIGINAL: the checkpoint that {manifest.source.id} was quantized from"
        console.print(words, soft_wrap=True)
