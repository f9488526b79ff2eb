"""Tokens a second in fp32 at the 0.6B geometry, against the peer's traced graph."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .checkpoint import CACHE, checkpoint
from .machine import save
from .process import Worker, ours, peer, run

SHAPES = ((1, 32), (8, 128), (1, 512))


def against_peer(rounds: int) -> None:
    """Two live processes, asked in turn; the same token ids of real text, the same threads."""
    source, threads = checkpoint("0.6b"), len(os.sched_getaffinity(0))
    mine, theirs = CACHE / "fp32-embedport", CACHE / "fp32-optimum-onnx"
    if not mine.exists():
        run(ours("export", "onnx", str(source), "-o", str(mine)))
    if not theirs.exists():
        run(peer("optimum_onnx.py", "export", str(source), str(theirs)))
    workers = {
        "embedport": Worker([sys.executable, "-m", "benchmarks.inference", str(mine)]),
        "optimum-onnx": Worker(peer("optimum_onnx.py", "serve", str(theirs), str(threads))),
    }
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            f"{batch}x{size}": _race(workers, _inputs(source, batch, size, Path(folder)), rounds)
            for batch, size in SHAPES
        }
    for worker in workers.values():
        worker.close()
    save("inference-0.6b-fp32", {"rounds": rounds, "threads": threads, "shapes": figures})


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
    request = {"ids": str(path)}
    for worker in workers.values():
        worker.ask(request)
    a, b = (np.load(path.with_suffix(suffix)) for suffix in (".ours.npy", ".peer.npy"))
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask(request)["seconds"])
    tokens = np.load(path)["input_ids"].size
    speeds = {name: tokens / median(each) for name, each in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "tokens_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        # Of rounds side by side: what slows the machine down slows both.
        "ratio": round(median(ratios), 3),
        "ratio_from_to": [round(min(ratios), 3), round(max(ratios), 3)],
        "minimum_cosine": float((a * b).sum(axis=1).min()),
    }


def serve(folder: str) -> None:
    """Our side of the race: the same protocol as the peer's."""
    import embedport

    embedder = embedport.load(folder, device="cpu")
    print(json.dumps({"ready": repr(embedder)}), flush=True)
    for line in sys.stdin:
        path = json.loads(line)["ids"]
        arrays = np.load(path)
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        start = time.perf_counter()
        vectors = embedder.model(ids, mask)
        seconds = time.perf_counter() - start
        np.save(Path(path).with_suffix(".ours.npy"), vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
