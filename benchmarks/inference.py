"""Tokens a second in fp32 at the 0.6B geometry, against the peer's traced graph."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import Worker, ours, peer, peer_versions, run

SHAPES = ((1, 32), (8, 128), (1, 512), (1, 2048))
MINIMUM_COSINE = 0.9999  # below it the two do not do the same work
ROUND_TOKENS = 512  # a shape smaller than this is run several times in a round


def against_peer(rounds: int, source: Path | None = None, results: Path = RESULTS) -> None:
    """Two live processes, asked in turn; the same token ids of real text, the same threads.

    Raises:
        RuntimeError: The two differ in threads or in vectors, so a race says nothing.
    """
    source = source or checkpoint("0.6b")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        mine, theirs = folder / "embedport", folder / "optimum-onnx"
        # Never one that lies there already: it may be an older exporter's, or another checkpoint's.
        run(ours("export", "onnx", str(source), "-o", str(mine), "--precision", "fp32"))
        run(peer("optimum_onnx.py", "export", str(source), str(theirs)))
        workers = {
            "embedport": Worker([sys.executable, "-m", "benchmarks.inference", str(mine)]),
            "optimum-onnx": Worker(peer("optimum_onnx.py", "serve", str(theirs))),
        }
        threads = {name: worker.ready["threads"] for name, worker in workers.items()}
        if len(set(threads.values())) > 1:
            raise RuntimeError(f"threads differ: {threads}")
        figures = {
            f"{batch}x{size}": _race(workers, _inputs(source, batch, size, folder), rounds)
            for batch, size in SHAPES
        }
        for worker in workers.values():
            worker.close()
    print_table(
        ["fp32 tokens/s", *workers, "ratio", "from", "to", "minimum cosine"],
        [
            [
                shape,
                *(each["tokens_per_second"][name] for name in workers),
                each["ratio"],
                *each["ratio_from_to"],
                f"{each['minimum_cosine']:.7f}",
            ]
            for shape, each in figures.items()
        ],
    )
    save(
        "inference-0.6b-fp32",
        {
            "rounds": rounds,
            "threads": threads["embedport"],
            "peer": peer_versions(),
            "shapes": figures,
        },
        results,
    )


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
    """Interleaved rounds after one to warm up, and proof that the two give the same vectors."""
    tokens = np.load(path)["input_ids"].size
    repeats = max(1, ROUND_TOKENS // tokens)
    request = {"ids": str(path), "repeats": repeats}
    for worker in workers.values():
        worker.ask(request)
    a, b = (np.load(path.with_suffix(suffix)) for suffix in (".ours.npy", ".peer.npy"))
    cosine = float((a * b).sum(axis=1).min())
    if not cosine >= MINIMUM_COSINE:  # also where it is NaN
        raise RuntimeError(f"{path.stem}: the two differ, minimum cosine {cosine}")
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        # Who goes first changes: it would run on what the other one left in the caches.
        for name in sorted(workers, reverse=number % 2 == 1):
            speeds[name].append(tokens * repeats / workers[name].ask(request)["seconds"])
    ratios = [mine / theirs for mine, theirs in zip(*speeds.values(), strict=True)]
    return {
        "tokens_per_second": {name: round(median(each), 1) for name, each in speeds.items()},
        "tokens_per_second_from_to": {
            name: [round(min(each), 1), round(max(each), 1)] for name, each in speeds.items()
        },
        # Of rounds side by side: what slows the machine down slows both.
        "ratio": round(median(ratios), 3),
        "ratio_from_to": [round(min(ratios), 3), round(max(ratios), 3)],
        "minimum_cosine": cosine,
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
        np.save(Path(request["ids"]).with_suffix(".ours.npy"), vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
