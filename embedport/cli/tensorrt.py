"""`embedport export tensorrt`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..machine.engine import LIBRARIES
from ..tables import command_words
from .inputs import AdapterOption, ArtifactOut, RevisionOption, TaskOption
from .outputs import echo_written, print_written, stages, stdout_console

if TYPE_CHECKING:
    from ..artifact.folder import Artifact


def export_tensorrt(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder, a hub id, or an artifact of the standard dialect."
        ),
    ],
    out: ArtifactOut,
    precision: Annotated[
        str | None,
        typer.Option(help="For a checkpoint: bf16 (the default), fp16, fp8, int8 or int4."),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="For int4: round to nearest; seconds, not minutes, and worse."),
    ] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Batch sizes to optimize for: MIN:OPT:MAX in rows x tokens, like "
            "1x1:8x128:32x512; repeatable."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="rtx (ahead of time, on any machine, with TensorRT for RTX) or this-gpu (with "
            "TensorRT); by default this-gpu where it is possible.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="For rtx, GPUs to build for, like 8.9; repeatable; by default all that can run "
            "the graph."
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="For this-gpu: allow later TensorRT releases of the same major version.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        str,
        typer.Option(
            help="For this-gpu: other GPUs that the engine should run on: none, ampere+ or "
            "same-capability."
        ),
    ] = "none",
    task: TaskOption = None,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a TensorRT engine: for RTX GPUs on any machine, or for this machine's GPU.

    Example: embedport export tensorrt Qwen/Qwen3-Embedding-0.6B -o qwen3-trt --precision fp8
    """
    from ..exporters.tensorrt import export_tensorrt as run
    from ..exporters.tensorrt import obstacle

    start = time.monotonic()
    with stages() as progress:
        artifact = run(
            source,
            out,
            precision=precision,
            fast=fast,
            profiles=profile,
            target=target,  # ty: ignore[invalid-argument-type] (checked there)
            compute_capabilities=compute_capability or (),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,  # ty: ignore[invalid-argument-type] (checked there)
            revision=revision,
            task=task,  # ty: ignore[invalid-argument-type] (checked there)
            adapter=adapter,
            force=force,
            progress=progress,
        )
    seconds = time.monotonic() - start
    engine = artifact.manifest.engine
    reason = None if engine else "; ".join(str(obstacle(library)) for library in LIBRARIES)
    if as_json:
        facts = {
            "precision": artifact.manifest.precision,
            "engine": engine is not None,
            "library": engine.builder if engine else None,
            "targets": engine.targets if engine else None,
            "products": dict(engine.products) if engine else None,
            "obstacle": reason,
        }
        echo_written(artifact, seconds, **facts)
    else:
        options = [f"--profile {text}" for text in profile or []]
        options += ["--version-compatible"] * version_compatible
        if hardware_compatible != "none":
            options.append(f"--hardware-compatible {hardware_compatible}")
        _print(artifact, reason, options, seconds)


def _print(artifact: Artifact, reason: str | None, options: list[str], seconds: float) -> None:
    console, engine = stdout_console(), artifact.manifest.engine
    print_written(artifact, seconds)
    if engine is not None:
        batches = ", ".join(map(str, engine.profiles))
        console.print(
            f"Engine for {engine.targets}; {engine.builder}; batches {batches}", soft_wrap=True
        )
        products = ", ".join(f"{count} in {kind}" for kind, count in engine.products.items())
        console.print(f"Products: {products or 'not named by the builder'}", soft_wrap=True)
        return
    console.print(f"No engine was built: {reason}", soft_wrap=True)
    console.print("Where one of them is, one of:", soft_wrap=True)
    folder = command_words([str(artifact.folder)])
    for command in (
        " ".join([f"embedport export tensorrt {folder} -o OUT", *options]),
        f"{folder}/engine/build.sh   (trtexec)",
        f"python {folder}/engine/check.py   (Polygraphy; compares the results too)",
    ):
        console.print(f"  {command}", soft_wrap=True)
