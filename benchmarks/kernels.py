"""Kernels of each instruction set, and onnxruntime's operators: four layers of the 0.6B geometry.

On a CPU with AVX-512 the AVX2 kernels run too. onnxruntime's own int8 and fp32 products use all of
the CPU's instructions in every case.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

from embedport.errors import InputError
from embedport.runtimes.ort_custom_ops import NONE, VARIABLE, register_kernels

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours

PRECISIONS = ("fp32", "int8", "int8-weight", "int4")
SETS = (NONE, "avx512", "avx2", "neon")
SHAPES = ((1, 32), (8, 128), (1, 512))


def compare_kernels(rounds: int, results: Path = RESULTS) -> None:
    """Tokens per second in interleaved rounds, and the speed-up over onnxruntime's operators.

    Args:
        rounds: Benchmark per shape.
        results: Folder of the results.
    """
    source = checkpoint("0.6b-4")
    figures: dict[str, Any] = {}
    for precision in PRECISIONS:
        with scratch() as folder:
            graph = export_ours(source, folder, precision) / "onnx" / "model.onnx"
            figures[precision] = _race(graph, rounds)
    rows = []
    for precision, shapes in figures.items():
        for shape, runners in shapes.items():
            cells = [
                "{tokens_a_second:,.0f} ({ratio:.2f})".format(**speed) for speed in runners.values()
            ]
            rows.append([precision, shape, *cells])
    print_table(["", "rows x tokens", *next(iter(figures["fp32"].values()))], rows)
    save("kernels-0.6b-4", {"rounds": rounds} | figures, results)


def _race(graph: Path, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    sessions = {name: session for name in SETS if (session := _open(graph, name)) is not None}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for batch, size in SHAPES:
        ids = np.random.default_rng(0).integers(0, 150_000, (batch, size))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for i in range(rounds + 1):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds)
                if i:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        figures[f"{batch} x {size}"] = {
            name: {
                "tokens_a_second": round(batch * size / median(times), 1),
                "ratio": round(median(np.divide(seconds[NONE], times)), 3),
            }
            for name, times in seconds.items()
        }
    return figures


def _open(graph: Path, name: str) -> Any:
    """A session with one instruction set's kernels; None if the CPU does not have it."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Otherwise the threads of idle sessions would spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with mock.patch.dict(os.environ, {VARIABLE: name}):
            register_kernels(options)
    except InputError:
        return None
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
