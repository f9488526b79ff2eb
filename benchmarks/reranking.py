"""Reranking at the 0.6B geometry: the rows' shared prefix computed once, against whole rows."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

from embedport.bench.rounds import Benchmark
from embedport.bench.runners import our_runner
from embedport.bench.threads import choose_threads
from embedport.bench.workloads import QUERIES, reranking
from embedport.runtimes import read_info

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours

# Scores that differ by less count as equal.
MOST_APART = 1e-4


def compare_prefix(
    rounds: int, source: Path | None = None, results: Path = RESULTS, precision: str = "int8"
) -> None:
    """Compare both ways on 8 queries with 50 passages each, query by query.

    Raises:
        RuntimeError: The scores differ.
    """
    source = source or checkpoint("0.6b", "reranker")
    with scratch() as folder:
        artifact = export_ours(source, folder, precision)
        threads = choose_threads()
        command = (sys.executable, "-m", "benchmarks.reranking", str(artifact))
        shared = replace(our_runner(read_info(artifact), threads), name="embedport, shared")
        plain = replace(shared, name="embedport, plain", command=command)
        workload = reranking(artifact / "tokenizer.json")
        with Benchmark(
            [shared, plain], threads, lambda stage: print(stage, file=sys.stderr)
        ) as benchmark:
            by_runner = benchmark.run(workload, rounds * QUERIES)
    difference = by_runner[plain.name].largest_difference
    if difference is None or difference > MOST_APART:
        raise RuntimeError(f"the scores differ by {difference}")
    print_table(
        [f"{workload.name}, {precision}", "tokens/s", "ratio", "from, to", "peak GB"],
        [
            [
                name,
                result.tokens_per_second,
                result.ratio,
                result.ratio_from_to,
                result.peak_bytes / 1e9,
            ]
            for name, result in by_runner.items()
        ],
    )
    tokens = sum(len(row) for part in workload.parts for row in part)
    figures = {name: asdict(result) for name, result in by_runner.items()}
    save(
        f"reranking-0.6b-{precision}",
        {"workload": workload.name, "tokens": tokens, **figures},
        results,
    )


def serve_plain(folder: str) -> None:
    """Serve the artifact without its second graph, which continues from a shared prefix."""
    from embedport.artifact.folder import Artifact
    from embedport.bench.peers import serving
    from embedport.runtimes import Reranker
    from embedport.runtimes.onnxruntime import OnnxModel
    from embedport.texts.prompts import RerankerTokenizer

    artifact = Artifact.open(folder)
    assert artifact.manifest.graph is not None
    graph = replace(artifact.manifest.graph, continuation=None)
    artifact = replace(artifact, manifest=replace(artifact.manifest, graph=graph))
    info = read_info(folder)
    tokenizer = RerankerTokenizer(info.folder / "tokenizer.json", info.max_length)
    reranker = Reranker(info, OnnxModel(artifact, "cpu"), tokenizer)
    serving.serve(lambda rows, _: reranker.score_rows(rows, [0] * len(rows)), choose_threads())


if __name__ == "__main__":
    serve_plain(*sys.argv[1:])
