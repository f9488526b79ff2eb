"""MatMulNBits' accuracy levels at the 0.6B geometry: speed, error, and dependence on the batch.

Level 1 multiplies in fp32; level 4 first rounds each block of a token's activations to 8 bits. The
error is measured against level 1 with the same weights, so that only the level's own error counts.
A difference also shows that onnxruntime really used another kernel: without one it falls back to
fp32.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import ours, run

FORMATS = {
    f"{precision}/{group}": ["--precision", precision, "--group-size", str(group), *options]
    for precision, options in (("int8-weight", []), ("int4", ["--fast"]))
    for group in (32, 128)
}
LEVELS = (1, 4)
BATCH, SIZE = 8, 128
ROUNDS = 5


def compare_levels(results: Path = RESULTS) -> None:
    """Measure each format at each level, in interleaved rounds."""
    source = checkpoint("0.6b")
    figures: dict[str, Any] = {}
    for name, options in FORMATS.items():
        with scratch() as folder:
            artifact = folder / "artifact"
            run(ours("export", "onnx", str(source), "-o", str(artifact), *options))
            command = [sys.executable, "-m", "benchmarks.levels", str(artifact / "onnx")]
            figures[name] = json.loads(run(command).output.splitlines()[-1])
    columns = ["tokens/s", "cosine to level 1", "alone to batch, largest difference"]
    print_table(
        ["MatMulNBits", "level", *columns],
        [
            [name, level, *row.values()]
            for name, levels in figures.items()
            for level, row in levels.items()
        ],
    )
    save("levels-0.6b", {"batch": BATCH, "size": SIZE, "rounds": ROUNDS} | figures, results)


def _compare(folder: Path) -> dict[str, dict[str, float]]:
    """Compare one artifact's graph at both levels, in this process."""
    import onnx
    import onnxruntime

    sessions = {}
    for level in LEVELS:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                    attribute.i = level
        path = folder / f"level-{level}.onnx"
        onnx.save(model, path)
        sessions[level] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 150_000, (BATCH, SIZE))
    seconds: dict[int, list[float]] = {level: [] for level in LEVELS}
    vectors = {level: _run(session, ids) for level, session in sessions.items()}
    for _ in range(ROUNDS):
        for level, session in sessions.items():
            start = time.perf_counter()
            _run(session, ids)
            seconds[level].append(time.perf_counter() - start)
    figures = {}
    for level, session in sessions.items():
        alone = np.concatenate([_run(session, row[None, :]) for row in ids])
        figures[str(level)] = {
            "tokens_per_second": round(ids.size / median(seconds[level]), 1),
            "minimum_cosine": float((vectors[level] * vectors[LEVELS[0]]).sum(axis=1).min()),
            "alone_to_batch": float(np.abs(alone - vectors[level]).max()),
        }
    return figures


def _run(session: Any, ids: np.ndarray) -> np.ndarray:
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return np.asarray(session.run(None, feeds)[0])


if __name__ == "__main__":
    print(json.dumps(_compare(Path(sys.argv[1]))))
