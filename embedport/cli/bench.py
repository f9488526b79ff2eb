"""`embedport bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from ..strict_json import to_json
from ..tables import Table, count_words, size_words
from .inputs import TaskOption, check_task
from .outputs import check_output, stderr_console, stdout_console, write_text

if TYPE_CHECKING:
    from ..bench.bench import Bench
    from ..bench.rounds import Result


def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(help="Folders or hub ids; the others are compared with the first."),
    ],
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="optimum-int8, openvino-int8, llama.cpp-q8_0, …: an unknown name lists them.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The checkpoint that peers serve; ideally the artifact's own."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Interleaved rounds per shape; passages and pairs have a fixed number."
        ),
    ] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a short version, in a few minutes.")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help=".json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    task: TaskOption = None,
) -> None:
    """Measure speed, start-up and memory on this CPU, side by side.

    Example: embedport bench qwen3-int8 --peer optimum-int8 --checkpoint Qwen/Qwen3-Embedding-0.6B
    """
    from ..bench.bench import bench as run

    check_output(out, ".json")
    with stderr_console().status("Starting") as status:
        result = run(
            artifacts,
            peers=peers or (),
            checkpoint=checkpoint,
            rounds=rounds,
            quick=quick,
            say=status.update,
            task=check_task(task),
        )
    text = to_json(result.to_dict(), indent=2)
    if out is not None:
        write_text(out, text + "\n")
    if as_json or not sys.stdout.isatty():
        typer.echo(text)
    else:
        _print(result)


def _print(result: Bench) -> None:
    from ..bench.machine import cpu_kind

    console = stdout_console()
    for name, runners in result.workloads.items():
        console.print(_workload_table(name, runners))
        for runner in result.failures.get(name, ()):
            console.print(f"  {runner} failed (the file of -o holds its last output)")
    console.print(_sides_table(result))
    machine, peak = result.machine, result.peak
    console.print(
        f"{cpu_kind(machine)}, {count_words(result.threads, 'thread')} per runner; "
        f"fastest matrix products: int8 {peak['uint8 x int8']:.2f}, fp32 {peak['fp32']:.2f} "
        "x 10^12 operations per second"
    )


def _workload_table(name: str, runners: dict[str, Result]) -> Table:
    rows = (
        (
            runner,
            f"{result.tokens_per_second:,.0f}",
            f"{result.from_to[0]:,.0f} - {result.from_to[1]:,.0f}",
            f"{result.ratio:.2f}",
            "own" if result.batch_rows is None else str(result.batch_rows),
        )
        for runner, result in runners.items()
    )
    return Table((name, "tokens/s", "from - to", "first is faster by", "batch"), tuple(rows))


def _sides_table(result: Bench) -> Table:
    rows = (
        (
            name,
            f"{median(runner.cold_start):.2f}",
            size_words(runner.peak_bytes) if runner.peak_bytes else "unknown",
            size_words(runner.bytes),
        )
        for name, runner in result.runners.items()
    )
    return Table(("", "cold start, s", "peak memory", "on disk"), tuple(rows))
