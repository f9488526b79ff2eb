"""Tokens a second at the 0.6B geometry: fp32 and int8, each against peers of its kind."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import Worker, ours, peer, peer_versions, run

SHAPES = ((1, 32), (8, 128), (1, 512), (1, 2048))
INT8_SHAPES = ((1, 32), (8, 128), (1, 512))
OURS = ("int8", "int8-weight", "int4", "fp32")
MINIMUM_COSINE = 0.9999  # below it the two do not do the same work
ROUND_TOKENS = 512  # a shape smaller than this is run several times in a round


def against_peer(rounds: int, source: Path | None = None, results: Path = RESULTS) -> None:
    """fp32 against the traced graph.

    Raises:
        RuntimeError: The two differ in threads or in vectors, so a race says nothing.
    """
    source = source or checkpoint("0.6b")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        # Never one that lies there already: it may be an older exporter's, or another checkpoint's.
        export_ours(source, folder, "fp32")
        run(peer("optimum_onnx.py", "export", str(source), str(folder / "optimum-onnx")))
        workers = {
            "embedport": serve_ours(folder / "fp32"),
            "optimum-onnx": Worker(peer("optimum_onnx.py", "serve", str(folder / "optimum-onnx"))),
        }
        figures = race(workers, source, folder, SHAPES, rounds)
    if (cosine := min(each["minimum_cosine"]["optimum-onnx"] for each in figures.values())) < (
        MINIMUM_COSINE
    ):
        raise RuntimeError(f"the two differ, minimum cosine {cosine}")
    save(
        "inference-0.6b-fp32",
        {"rounds": rounds, "peer": peer_versions(), "shapes": figures},
        results,
    )


def int8_against_peers(rounds: int, source: Path | None = None, results: Path = RESULTS) -> None:
    """int8 against onnxruntime's dynamic int8 of the traced graph, and OpenVINO's int8.

    Cosines are to our fp32 graph's vectors, which race too.
    """
    source = source or checkpoint("0.6b")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        for precision in OURS:
            export_ours(source, folder, precision)
        traced, dynamic, openvino = (folder / name for name in ("traced", "dynamic", "openvino"))
        run(peer("optimum_onnx.py", "export", str(source), str(traced)))
        run(peer("optimum_onnx.py", "quantize", str(traced), str(dynamic)))
        run(peer("openvino_int8.py", "export", str(traced), str(openvino)))
        workers = {f"embedport {name}": serve_ours(folder / name) for name in OURS}
        workers["optimum-onnx int8"] = Worker(peer("optimum_onnx.py", "serve", str(dynamic)))
        workers["OpenVINO int8"] = Worker(peer("openvino_int8.py", "serve", str(openvino)))
        figures = race(workers, source, folder, INT8_SHAPES, rounds)
        sizes = {name: _size(folder / name) for name in (*OURS, "dynamic", "openvino")}
    save(
        "inference-0.6b-int8",
        {
            "rounds": rounds,
            "peers": peer_versions() | peer_versions("openvino_int8.py"),
            "bytes": sizes,
            "shapes": figures,
        },
        results,
    )


def export_ours(source: Path, folder: Path, precision: str) -> None:
    """Export into the folder, under the precision's name."""
    options = ["-o", str(folder / precision), "--precision", precision]
    run(ours("export", "onnx", str(source), *options))


def serve_ours(folder: Path) -> Worker:
    """A worker on our artifact."""
    return Worker([sys.executable, "-m", "benchmarks.inference", str(folder)])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def race(
    workers: dict[str, Worker],
    source: Path,
    folder: Path,
    shapes: Sequence[tuple[int, int]],
    rounds: int,
) -> dict[str, Any]:
    """Live processes, asked in turn: the same token ids of real text, the same threads.

    The first is ours; each other's ratio is our speed by its. Cosines are to the first's vectors,
    or to those of our fp32 graph where it takes part.

    Raises:
        RuntimeError: The threads differ, so a race says nothing.
    """
    threads = {name: worker.ready["threads"] for name, worker in workers.items()}
    if len(set(threads.values())) > 1:
        raise RuntimeError(f"threads differ: {threads}")
    figures = {}
    for batch, size in shapes:
        figures[f"{batch}x{size}"] = each = _race(
            workers, _inputs(source, batch, size, folder), rounds
        )
        print_table(
            [f"{batch}x{size}", "tokens/s", "ratio", "from", "to", "minimum cosine"],
            [
                [
                    name,
                    each["tokens_per_second"][name],
                    each["ratio"].get(name, ""),
                    *each["ratio_from_to"].get(name, ("", "")),
                    f"{each['minimum_cosine'][name]:.7f}",
                ]
                for name in workers
            ],
        )
    for worker in workers.values():
        worker.close()
    return figures


def _inputs(source: Path, batch: int, size: int, folder: Path) -> Path:
    """Token ids of real text, every row full."""
    from embedport.demo.samples import builtin_samples
    from embedport.prompts import EmbeddingTokenizer

    tokenizer = EmbeddingTokenizer(source / "tokenizer.json", 32768)
    ids = np.concatenate(tokenizer.encode([each.text for each in builtin_samples()]).ids)
    rows = np.resize(ids, batch * size).reshape(batch, size)
    path = folder / f"{batch}x{size}.npz"
    np.savez(path, input_ids=rows, attention_mask=np.ones_like(rows))
    return path


def _race(workers: dict[str, Worker], path: Path, rounds: int) -> dict[str, Any]:
    """Interleaved rounds after one to warm up."""
    tokens = np.load(path)["input_ids"].size
    repeats = max(1, ROUND_TOKENS // tokens)
    requests: dict[str, dict[str, Any]] = {
        name: {"ids": str(path), "repeats": repeats, "vectors": str(path.with_suffix(f".{i}.npy"))}
        for i, name in enumerate(workers)
    }
    for name, worker in workers.items():
        worker.ask(requests[name])
    vectors = {name: np.load(request["vectors"]) for name, request in requests.items()}
    first = next(iter(workers))
    reference = vectors.get("embedport fp32", vectors[first])
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        # Who goes first changes: it would run on what the other one left in the caches.
        for name in sorted(workers, reverse=number % 2 == 1):
            speeds[name].append(tokens * repeats / workers[name].ask(requests[name])["seconds"])
    ratios = {
        # Of rounds side by side: what slows the machine down slows both.
        name: [mine / theirs for mine, theirs in zip(speeds[first], each, strict=True)]
        for name, each in speeds.items()
        if name != first
    }
    return {
        "tokens_per_second": {name: round(median(each), 1) for name, each in speeds.items()},
        "tokens_per_second_from_to": {
            name: [round(min(each), 1), round(max(each), 1)] for name, each in speeds.items()
        },
        "ratio": {name: round(median(each), 3) for name, each in ratios.items()},
        "ratio_from_to": {
            name: [round(min(each), 3), round(max(each), 3)] for name, each in ratios.items()
        },
        "minimum_cosine": {
            name: float((each * reference).sum(axis=1).min()) for name, each in vectors.items()
        },
    }


def serve(folder: str) -> None:
    """Our side of the race: the same protocol as the peer's."""
    import onnxruntime  # noqa: F401 (before threads are counted: its import starts some)

    import embedport

    before = len(list(Path("/proc/self/task").iterdir()))
    embedder = embedport.load(folder, device="cpu")
    threads = len(list(Path("/proc/self/task").iterdir())) - before + 1
    print(json.dumps({"ready": repr(embedder), "threads": threads}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        arrays = np.load(request["ids"])
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        start = time.perf_counter()
        for _ in range(request["repeats"]):
            vectors = embedder.model(ids, mask)
        seconds = time.perf_counter() - start
        np.save(request["vectors"], vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
