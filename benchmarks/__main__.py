"""`python -m benchmarks`: run all measurements, or one by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import (
    attention,
    auto_round,
    backend,
    batches,
    bulk,
    checkpoints,
    compatibility,
    engines,
    export,
    gpu,
    kernels,
    levels,
    loaders,
    olive,
    openvino,
    outliers,
    packed,
    parity,
    profiling,
    reranking,
    retrieval,
    rounding,
    serve,
    speed,
)
from .machine import RESULTS

app = typer.Typer(add_completion=False, invoke_without_command=True)
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="A checkpoint's folder; default: random weights at the geometry.",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


@app.callback()
def everything(context: typer.Context) -> None:
    """Measure everything but the 8B geometry, which needs 35 GB of disk."""
    if context.invoked_subcommand is None:
        export.compare_with_peer(3)
        speed.compare_with_peers(5)
        batches.compare_batches(5)
        attention.compare_attention(5)
        outliers.compare_with_dynamic_int8()
        retrieval.measure_retrieval()
        checkpoints.measure_demo_pair()
        checkpoints.measure_0_6b()
        loaders.compare_on_demo_pair()
        loaders.compare_on_four_layers()
        levels.compare_levels()
        profiling.profile_int8()
        olive.compare_with_olive()
        auto_round.compare_with_auto_round()
        openvino.compare_openvino()
        engines.build_rtx_engines(["demo", "0.6b"])
        parity.measure_parity()
        reranking.compare_prefix(3)
        bulk.measure_bulk()
        serve.measure_serve()
        backend.compare_backend()


@app.command("export")
def _export(rounds: Rounds = 3, checkpoint: Checkpoint = None, out: Out = RESULTS) -> None:
    """Export time and memory against optimum-onnx."""
    export.compare_with_peer(rounds, checkpoint, out)


@app.command("precisions")
def _precisions(checkpoint: Checkpoint = None, out: Out = RESULTS) -> None:
    """Export time, memory and size at each precision."""
    export.measure_precisions(checkpoint, out)


@app.command("export-8b")
def _export_8b(precision: str = "bf16", checkpoint: Checkpoint = None, out: Out = RESULTS) -> None:
    """Peak memory of exporting the 8B geometry."""
    export.measure_8b(precision, checkpoint, out)


@app.command("speed")
def _speed(
    rounds: Rounds = 5,
    quick: Annotated[bool, typer.Option("--quick", help="int8 alone, five minutes.")] = False,
    contest: Annotated[
        list[speed.Name] | None, typer.Option(help="Run only these contests.")
    ] = None,
    checkpoint: Checkpoint = None,
    out: Out = RESULTS,
) -> None:
    """Speed, start-up, memory and size against every peer."""
    speed.compare_with_peers(
        rounds,
        names=contest or tuple(speed.Name),
        quick=quick,
        source=checkpoint,
        results=out,
    )


@app.command("batches")
def _batches(rounds: Rounds = 5, out: Out = RESULTS) -> None:
    """Speed by the number of tokens per batch."""
    batches.compare_batches(rounds, out)


@app.command("attention")
def _attention(rounds: Rounds = 5, out: Out = RESULTS) -> None:
    """Speed of the attention implementations on a CPU, by row length."""
    attention.compare_attention(rounds, out)


@app.command("outliers")
def _outliers(out: Out = RESULTS) -> None:
    """int8 on a checkpoint with planted outliers, against onnxruntime's dynamic int8."""
    outliers.compare_with_dynamic_int8(out)


@app.command("retrieval")
def _retrieval(out: Out = RESULTS) -> None:
    """Quality of the demo embedder and its quantized variants on the held-out set."""
    retrieval.measure_retrieval(out)


@app.command("checkpoints")
def _checkpoints(
    demo: Annotated[bool, typer.Option(help="Parity and retrieval on the demo pair.")] = True,
    large: Annotated[bool, typer.Option(help="Memory and time at the 0.6B geometry.")] = True,
    checkpoint: Checkpoint = None,
    out: Out = RESULTS,
) -> None:
    """Quantized checkpoints by method."""
    if demo:
        checkpoints.measure_demo_pair(out)
    if large:
        checkpoints.measure_0_6b(checkpoint, out)


@app.command("packed")
def _packed(
    products: Annotated[bool, typer.Option(help="A layer's products on a GPU instead.")] = False,
    out: Out = RESULTS,
) -> None:
    """Memory of a checkpoint on a CPU: in 16 bits, and in 4 bits that stay packed."""
    if products:
        packed.measure_products(out)
    else:
        packed.measure_memory(out)


@app.command("loaders")
def _loaders(
    demo: Annotated[bool, typer.Option(help="The demo pair.")] = True,
    large: Annotated[bool, typer.Option(help="Four layers of the 0.6B geometry.")] = True,
    out: Out = RESULTS,
) -> None:
    """Quantized checkpoints in the libraries that own their formats, against this runtime."""
    if demo:
        loaders.compare_on_demo_pair(out)
    if large:
        loaders.compare_on_four_layers(out)


@app.command("levels")
def _levels(
    kernels: Annotated[bool, typer.Option(help="MatMulNBits' accuracy levels, 0.6B.")] = True,
    demo: Annotated[bool, typer.Option(help="Algorithms and groups on the demo pair.")] = True,
    only: Annotated[str, typer.Option(help="Rows of the demo pair that contain this.")] = "",
    pair: Annotated[
        Path | None, typer.Option(help="A pair of another width: see benchmarks.demo --width.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """4 bits: what MatMulNBits' accuracy levels cost, and what each algorithm keeps."""
    if demo:
        rounding.measure_rounding(out, only, pair)
    if kernels:
        levels.compare_levels(out)


@app.command("olive")
def _olive(out: Out = RESULTS) -> None:
    """Olive's 4-bit recipe on the demo embedder, beside ours at as many bytes."""
    olive.compare_with_olive(out)


@app.command("auto-round")
def _auto_round(out: Out = RESULTS) -> None:
    """AutoRound's 4 bits on the demo pair, beside ours of the same formats and texts."""
    auto_round.compare_with_auto_round(out)


@app.command("kernels")
def _kernels(rounds: Rounds = 7, out: Out = RESULTS) -> None:
    """The kernels of each instruction set this CPU has, and onnxruntime's operators."""
    kernels.compare_kernels(rounds, out)


@app.command("profile")
def _profile(out: Out = RESULTS) -> None:
    """Where the time of the int8 graph goes."""
    profiling.profile_int8(out)


@app.command("engines")
def _engines(
    geometry: Annotated[
        list[str] | None, typer.Option(help="demo, 0.6b, 8b, or 8b-4 for four layers of it.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    out: Out = RESULTS,
) -> None:
    """Engines of TensorRT for RTX, built without a GPU: layers, time, memory, size."""
    engines.build_rtx_engines(geometry or ["demo", "0.6b"], precision, out)


@app.command("openvino")
def _openvino(out: Out = RESULTS) -> None:
    """The standard dialect's graphs in OpenVINO."""
    openvino.compare_openvino(out)


@app.command("parity")
def _parity() -> None:
    """Parity at the 0.6B geometry."""
    parity.measure_parity()


@app.command("gpu")
def _gpu(
    checkpoint: Checkpoint = None,
    only: Annotated[
        str, typer.Option(help="Paths with this in their name, and the reference; needs --out.")
    ] = "",
    out: Path = gpu.RESULTS,
) -> None:
    """Every path on this machine's GPU; writes docs/gpu-results.json."""
    if only and out == gpu.RESULTS:
        raise typer.BadParameter(f"--only would drop the other rows of {out}: give --out FILE")
    gpu.measure_paths(checkpoint, out, only)


@app.command("reranking")
def _reranking(
    rounds: Rounds = 3, precision: str = "int8", checkpoint: Checkpoint = None, out: Out = RESULTS
) -> None:
    """8 queries with 50 passages each: the shared prefix computed once, against each row whole."""
    reranking.compare_prefix(rounds, checkpoint, out, precision)


@app.command("bulk")
def _bulk(texts: int = bulk.TEXTS, out: Out = RESULTS) -> None:
    """A corpus of short texts: memory over time, and a resume after kill -9."""
    bulk.measure_bulk(out, texts)


@app.command("serve")
def _serve(
    precision: str = "fp32",
    infinity: Annotated[
        Path | None, typer.Option(help="infinity_emb of another environment, to compare with.")
    ] = None,
    rounds: Rounds = 3,
    out: Out = RESULTS,
) -> None:
    """The server: 200 clients, 20,000 requests, every answer checked; memory and latency."""
    serve.measure_serve(out, precision=precision, infinity=infinity, rounds=rounds)


@app.command("compatibility")
def _compatibility(
    only: Annotated[
        list[str] | None, typer.Option(help="Run the rows with this text in their name.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Every consumer in its own environment; writes the table of docs/compatibility.md."""
    compatibility.run_consumers(out, only or ())


@app.command("backend")
def _backend() -> None:
    """The artifact in sentence-transformers' ONNX backend."""
    backend.compare_backend()


app()
