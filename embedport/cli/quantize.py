"""`embedport quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


def quantize(
    checkpoint: CheckpointArgument,
    out: ArtifactOut,
    method: Annotated[str, typer.Option(help="bnb-int8, bnb-nf4, gptq, awq, w8a8 or fp8.")],
    bits: Annotated[int | None, typer.Option(help="Bits for gptq: 4 or 8; 4 by default.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale, for gptq and awq: 32, 64 or 128; 128 by default."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Your texts (.txt, .jsonl) or pairs (.jsonl) for calibrated methods; default: "
            "built-in ones, on a CPU 8,192 tokens of them; builtin: all of them."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where calibration runs: cpu, or cuda (in torch).")
    ] = "cpu",
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="For bnb-nf4: quantize the scales too.")
    ] = False,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="For awq: no zero points, for readers without.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="For gptq, awq, w8a8, bnb-nf4: simpler; quicker, worse.")
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            help="A reranker's architecture: causal-lm (the default) or sequence-classification "
            "(one logit)."
        ),
    ] = None,
    task: TaskOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    dry_run: DryRunOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize a checkpoint into one that transformers, vLLM and others load.

    Example: embedport quantize Qwen/Qwen3-Embedding-0.6B -o qwen3-awq --method awq
    """
    from ..exporters.checkpoints import Options, estimate_checkpoint, quantize_checkpoint

    options = Options(
        method=method,
        bits=bits,
        group_size=group_size,
        double_quant=double_quant,
        symmetric=symmetric,
        fast=fast,
        form=form,
        calibration=calibration,
        device=device,
    )
    places: dict[str, Any] = {
        "revision": revision,
        "task": task,
        "adapter": adapter,
        "force": force,
    }
    if dry_run:
        print_estimate(estimate_checkpoint(checkpoint, out, options, **places), as_json=as_json)
        return
    start = time.monotonic()
    with stages() as progress:
        artifact = quantize_checkpoint(
            checkpoint, out, **vars(options), **places, progress=progress
        )
    seconds = time.monotonic() - start
    if as_json:
        echo_written(artifact, seconds, method=artifact.manifest.precision)
    else:
        _print(artifact, seconds)


def _print(artifact: Artifact, seconds: float) -> None:
    console = stdout_console()
    print_written(artifact, seconds)
    console.print("Next:")
    console.print(f"  {validate_command(artifact)}", soft_wrap=True)
    console.print(f"With vLLM: see {artifact.folder / 'vllm.md'}", soft_wrap=True)
