"""Speed of the attention implementations on a CPU, by row length: int8 at the 0.6B geometry.

One is the kernel in C; the others are the branches of onnxruntime operators that a graph contains.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from embedport.runtimes.ort_custom_ops import register_kernels

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours, run

KERNEL = "kernel"
# Name of the function that the kernel replaces, and a name that keeps the kernel out.
ATTENTION, OPERATORS = "RotaryAttention", "AttentionOfOperators"
# The limits that force each other implementation: tokens of a small row and of a short one.
LIMITS = {"fused": (0, 0), "whole": (1 << 20, 1 << 20), "in four parts": (0, 1 << 20)}
WAYS = (KERNEL, *LIMITS)
SHAPES = ((1, 32), (32, 32), (8, 128), (4, 256), (1, 512), (1, 768), (1, 1024), (1, 2048))
RUNS = 3


def compare_attention(rounds: int, results: Path = RESULTS) -> None:
    """Milliseconds of one graph with each attention implementation, in interleaved processes.

    Args:
        rounds: Processes per implementation.
        results: Folder of the results.
    """
    source = checkpoint("0.6b")
    spent: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with scratch() as folder:
        graph = export_ours(source, folder, "int8") / "onnx" / "model.onnx"
        graphs = {KERNEL: graph}
        graphs |= {way: _with_limits(graph, way, *limits) for way, limits in LIMITS.items()}
        for _ in range(rounds):
            for way, path in graphs.items():
                output = run([sys.executable, "-m", "benchmarks.attention", str(path)]).output
                for shape, milliseconds in json.loads(output.splitlines()[-1]).items():
                    spent[shape, way].append(milliseconds)
    shapes = [f"{batch}x{size}" for batch, size in SHAPES]
    figures = {
        shape: {
            way: {
                "milliseconds": round(median(spent[shape, way]), 1),
                "fastest": round(min(spent[shape, way]), 1),
                "slowest": round(max(spent[shape, way]), 1),
            }
            for way in WAYS
        }
        for shape in shapes
    }
    print_table(
        ["rows x tokens", *WAYS],
        [
            [shape, *("{} ({}, {})".format(*times.values()) for times in ways.values())]
            for shape, ways in figures.items()
        ],
    )
    save("attention-0.6b-int8", figures, results)


def _with_limits(graph: Path, way: str, small: int, short: int) -> Path:
    """Save a copy of the graph with other limits and attention renamed to avoid the kernel."""
    model = ir.load(graph)
    for function in model.functions.values():
        if function.name == ATTENTION:
            function.name = OPERATORS
    for node in model.graph:
        if node.op_type == ATTENTION:
            node.op_type = OPERATORS
    compared = [node for node in model.graph if node.op_type == "LessOrEqual"]
    for node, limit in zip(compared, (short, small), strict=True):
        tensor = ir.tensor(np.array(limit), name=f"limit_{node.name}")
        value = ir.Value(name=tensor.name, const_value=tensor)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    path = graph.with_name(f"{way.replace(' ', '-')}.onnx")
    ir.save(model, path)
    return path


def _measure(graph: Path) -> dict[str, float]:
    """Milliseconds of the fastest run at each shape; other operators keep their kernels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    register_kernels(options)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    fastest = {}
    for batch, size in SHAPES:
        ids = random.integers(0, 150_000, (batch, size))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        session.run(None, feeds)
        milliseconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            session.run(None, feeds)
            milliseconds.append(1000 * (time.perf_counter() - start))
        fastest[f"{batch}x{size}"] = min(milliseconds)
    return fastest


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]))))
