"""Parity at the 0.6B geometry with Qwen3's tokenizer: tasks, dialects and precisions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

import embedport
from embedport.checkpoint.spec import Task
from embedport.validation.opening import open_live
from embedport.validation.tasks import EmbeddingTask, RerankerTask, choose_inputs

from .checkpoint import CACHE, make
from .machine import print_table, save

CASES = [
    (dialect, precision)
    for dialect in ("ort", "standard")
    for precision in ("fp32", "fp16", "bf16")
]
TASKS: tuple[Task, ...] = ("embedding", "reranker")
# Use every fourth built-in text and pair: still all lengths, languages and ragged batches.
EVERY = 4
MAX_LENGTH = 1024


def measure_parity() -> None:
    """Compare each artifact with one run of the reference; artifacts are deleted afterwards."""
    figures: dict[str, Any] = {}
    for name in TASKS:
        source = CACHE / f"parity-{name}"
        make("0.6b", str(source), name)
        task = _inputs(name)
        reference = open_live(source, task=name, max_length=MAX_LENGTH, device="cpu")
        expected = reference.run(task.inputs, "fp32")
        for dialect, precision in CASES:
            results = _run(task, source, dialect, precision)
            comparison = task.compare(results, expected, "fp32 on fp16-rounded weights, cpu")
            figures[f"{name} {dialect} {precision}"] = {
                "compared": comparison.compared,
                **comparison.figures,
            }
        shutil.rmtree(source)
    keys = ("minimum cosine", "maximum score difference", "Kendall tau")
    print_table(
        ["artifact", *keys],
        [[case, *(row.get(key, "") for key in keys)] for case, row in figures.items()],
    )
    save("parity-0.6b", {"artifacts": figures})


def _inputs(name: Task) -> EmbeddingTask | RerankerTask:
    task = choose_inputs(name, None, None)
    if isinstance(task, EmbeddingTask):
        return EmbeddingTask(task.inputs[::EVERY])
    return RerankerTask(task.inputs[::EVERY])


def _run(
    task: EmbeddingTask | RerankerTask, source: Path, dialect: str, precision: str
) -> np.ndarray:
    out = CACHE / "parity-artifact"
    embedport.export(
        source,
        out,
        dialect=dialect,
        precision=precision,
        max_length=MAX_LENGTH,
        force=out.exists(),
    )
    runtime: Any = embedport.load(out, device="cpu")
    results = task.run(runtime, progress=False)
    shutil.rmtree(out)
    return results
