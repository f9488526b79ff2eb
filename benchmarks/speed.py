"""All workloads at the 0.6B geometry: our artifacts against every peer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, Literal

from .checkpoint import CACHE, ROOT, checkpoint, scratch
from .machine import RESULTS, print_table, read_kept
from .process import export_ours

NAME = "speed-0.6b"
CHART = ROOT / "docs" / "speed.svg"


class Name(StrEnum):
    """Names of the contests."""

    EMBEDDING = "embedding"
    RERANKING = "reranking"
    PRECISIONS = "precisions"


@dataclass(frozen=True)
class Contest:
    """One run of `bench`.

    Attributes:
        task: The checkpoint's task.
        precisions: Precisions of our artifacts; all runners are compared with the first.
        peers: Names of the peers.
    """

    task: Literal["embedding", "reranker"]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]


INT8_PEERS = ("optimum-int8", "openvino-int8", "llama.cpp-q8_0")
CONTESTS: dict[Name, Contest] = {
    Name.EMBEDDING: Contest("embedding", ("int8",), INT8_PEERS),
    Name.RERANKING: Contest("reranker", ("int8",), INT8_PEERS),
    Name.PRECISIONS: Contest(
        "embedding",
        ("int8", "int4", "fp32"),
        (
            "llama.cpp-q4_k_m",
            "openvino-bf16",
            "sentence-transformers-bf16",
            "sentence-transformers-onnx",
            "optimum-fp32",
        ),
    ),
}
QUICK_PEERS = ("optimum-int8", "openvino-int8")


def compare_with_peers(
    rounds: int,
    *,
    names: Sequence[Name] = tuple(Name),
    quick: bool = False,
    source: Path | None = None,
    results: Path = RESULTS,
) -> None:
    """Compare embedding and reranking in int8, then other precisions with peers of other widths.

    Each contest is a separate run, because all runners together do not fit into memory. Its results
    are written when it ends, beside those of other runs on this kind of CPU. Peers serve the
    embedding checkpoint in both tasks: a pair's vector is as much work as its score.

    Args:
        rounds: Rounds of each workload of one length.
        names: The contests of `CONTESTS` to run.
        quick: Only int8, with few peers and small workloads.
        source: The embedding checkpoint; random weights at the 0.6B geometry by default.
        results: Folder of the results and the chart; by default the chart goes to docs/.

    Raises:
        InputError: The results file holds figures of another kind of CPU.
    """
    from embedport.bench.bench import bench

    source = source or checkpoint("0.6b")
    path = results / f"{NAME}{'-quick' if quick else ''}.json"
    saved = read_kept(path, lambda kept: [contest["machine"] for contest in kept.values()])
    for name in names:
        if quick and name is Name.PRECISIONS:
            continue
        contest = CONTESTS[name]
        origin = source if contest.task == "embedding" else checkpoint("0.6b", contest.task)
        with scratch() as folder:
            result = bench(
                [export_ours(origin, folder, precision) for precision in contest.precisions],
                peers=QUICK_PEERS if quick else contest.peers,
                checkpoint=source,
                rounds=rounds,
                quick=quick,
                cache=CACHE / "peers",
                say=lambda stage: print(stage, file=sys.stderr, flush=True),
            )
        saved[name] = result.to_dict()
        print_results(saved[name])
        results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"wrote {path}")
    if not quick and {Name.EMBEDDING, Name.RERANKING} <= saved.keys():
        draw(saved, CHART if results == RESULTS else results / CHART.name)


def print_results(bench: dict[str, Any]) -> None:
    """Print the tables of one benchmark."""
    for workload, runners in bench["workloads"].items():
        print_table(
            [workload, "tokens/s", "from, to", "ratio", "from, to", "batch", "minimum cosine"],
            [
                [
                    name,
                    result["tokens_per_second"],
                    "{}, {}".format(*result["from_to"]),
                    result["ratio"],
                    "{}, {}".format(*result["ratio_from_to"]),
                    result["batch_rows"] or "own",
                    result["minimum_cosine"],
                ]
                for name, result in runners.items()
            ],
        )
    for workload, failed in bench["failures"].items():
        print(f"{workload}: {', '.join(failed)} failed")
    print_table(
        ["", "cold start, s", "peak GB", "on disk GB"],
        [
            [
                name,
                median(runner["cold_start"]),
                round(runner["peak_bytes"] / 1e9, 2),
                round(runner["bytes"] / 1e9, 3),
            ]
            for name, runner in bench["runners"].items()
        ],
    )
    print(bench["peak"])


def draw(contests: dict[str, Any], path: Path) -> None:
    """Tokens a second of each runner in int8, a panel a kind of work."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    workloads = contests["embedding"]["workloads"] | contests["reranking"]["workloads"]
    figure = Figure(figsize=(8, 2.6 * -(-len(workloads) // 2)), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(-(-len(workloads) // 2), 2).flat
    for axes, (workload, runners) in zip(panels, workloads.items(), strict=False):
        names = list(runners)[::-1]
        speeds = [runners[name]["tokens_per_second"] for name in names]
        colors = ["#2a6fbb" if name.startswith("embedport") else "#a8b3bd" for name in names]
        bars = axes.barh(names, speeds, color=colors)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=7)
        axes.set_title(f"{workload}, tokens/s", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xticks([])
        axes.margins(x=0.15)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    for axes in panels:
        axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")
