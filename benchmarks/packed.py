"""Quantized checkpoints that stay quantized: memory on a CPU, memory and speed on a GPU."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import run

# Eight layers and the whole table: 0.56 GB in 16 bits.
GEOMETRY = "0.6b-8"
TEXTS = 16
# Encodes texts and prints by how much its memory grew since its libraries were imported.
PROGRAM = """
import resource, sys
import embedport, embedport.runtimes, onnxruntime
if sys.argv[2] == "torch":
    import torch, transformers
    transformers.Qwen3Model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
embedder = embedport.load(sys.argv[1], device="cpu")
embedder.encode(["a text about tea, and what it is " * 3] * int(sys.argv[3]))
print(embedder.precision, before, peak(), sep="|")
"""


def on_a_cpu(results: Path = RESULTS) -> None:
    """Peak memory of a bf16 checkpoint and of its W4A16, when the graph is built and afterwards."""
    figures: dict[str, dict[str, Any]] = {}
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        source, out = checkpoint(GEOMETRY), Path(temporary) / "w4a16"
        run([sys.executable, "-m", "benchmarks.packed", str(source), str(out), "awq"])
        for name, folder, library in (
            ("bf16", source, "torch"),
            ("W4A16, the graph is built", out, "onnxruntime"),
            ("W4A16", out, "onnxruntime"),
        ):
            finished = run([sys.executable, "-c", PROGRAM, str(folder), library, str(TEXTS)])
            precision, before, peak = finished.output.strip().splitlines()[-1].split("|")
            figures[name] = {
                "precision": precision,
                "checkpoint_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
                "libraries_bytes": int(before),
                "peak_bytes": int(peak),
            }
    save("packed_cpu", {"geometry": GEOMETRY, "rows": figures}, results)
    print_table(
        ["checkpoint", "MB on disk", "computed in", "peak MB", "of which libraries"],
        [
            [
                name,
                row["checkpoint_bytes"] // 10**6,
                row["precision"],
                row["peak_bytes"] // 10**6,
                row["libraries_bytes"] // 10**6,
            ]
            for name, row in figures.items()
        ],
    )


if __name__ == "__main__":
    # A child process writes it: a child's peak memory starts at its parent's.
    from tests.synthetic import round_to_nearest

    shutil.rmtree(sys.argv[2], ignore_errors=True)
    round_to_nearest(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
