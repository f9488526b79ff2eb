"""Time of an int8 graph by operator, with and without the kernels in C.

For comparison: the machine's fastest matrix products, and the time that the graph's products would
take at that speed.
"""

# Not named "profile": scripts in this folder would import it instead of the standard library's.
from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from embedport.bench.machine import PRODUCTS, measure_peak
from embedport.checkpoint.spec import ModelSpec
from embedport.runtimes.ort_custom_ops import register_kernels

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours, run

SHAPES = ((1, 32), (8, 128), (1, 512))
RUNS = 6


def profile_int8(results: Path = RESULTS) -> None:
    """Time and share of each operator at each shape, in the fastest of several runs."""
    source = checkpoint("0.6b")
    with scratch() as folder:
        export_ours(source, folder, "int8")
        command = [sys.executable, "-m", "benchmarks.profiling", str(folder / "int8")]
        figures = json.loads(run(command).output.splitlines()[-1])
    for way, shapes in figures["ways"].items():
        for shape, times in shapes.items():
            print_table(
                [f"{shape} {way}, {times['milliseconds']} ms", "ms", "share"],
                [
                    [name, ms, f"{ms / times['nodes_ms']:.1%}"]
                    for name, ms in times["operators"].items()
                ],
            )
    print_table(["product", "10^12 operations/s"], [[*speed] for speed in figures["peak"].items()])
    spec = ModelSpec.from_checkpoint(source)
    limits = {shape: _limit(spec, *shape, figures["peak"]) for shape in SHAPES}
    figures["limits_ms"] = {f"{a}x{b}": limit for (a, b), limit in limits.items()}
    print_table(
        ["at these speeds, ms", "8-bit products", "attention's"],
        [[f"{a}x{b}", *limit.values()] for (a, b), limit in limits.items()],
    )
    save("profile-0.6b-int8", figures, results)


def _limit(spec: ModelSpec, batch: int, size: int, peak: dict[str, float]) -> dict[str, float]:
    """Milliseconds that the products alone take at the machine's fastest speed.

    Attention is causal: a token attends to earlier tokens and itself. In the last layer, only one
    token per row continues after attention.
    """
    tokens = batch * size
    rows = {"o": batch, "gate": batch, "up": batch, "down": batch}
    products = 0
    for name, shape in spec.tensor_shapes().items():
        layer, _, part = name.removesuffix("_proj.weight").rpartition(".")
        if name.endswith("_proj.weight"):
            last = layer.startswith(f"layers.{spec.num_layers - 1}.")
            products += 2 * math.prod(shape) * (rows.get(part, tokens) if last else tokens)
    scores = spec.num_layers * spec.num_heads * batch * size * (size + 1) / 2
    attention = 2 * 2 * scores * spec.head_dim
    return {
        "products": round(products / peak["uint8 x int8"] / 1e9, 1),
        "attention": round(attention / peak["fp32"] / 1e9, 1),
    }


def _measure(folder: Path) -> dict[str, Any]:
    from embedport.texts.prompts import EmbeddingTokenizer
    from embedport.texts.samples import builtin_samples

    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", 32768)
    ids = np.concatenate(tokenizer.encode([sample.text for sample in builtin_samples()]).ids)
    graph = folder / "onnx" / "model.onnx"
    ways = {
        way: {
            f"{batch}x{size}": _profile(
                graph, np.resize(ids, batch * size).reshape(batch, size), kernels=way == "kernels"
            )
            for batch, size in SHAPES
        }
        for way in ("kernels", "without")
    }
    return {"ways": ways, "peak": measure_peak()}


def _profile(graph: Path, ids: np.ndarray, *, kernels: bool) -> dict[str, Any]:
    """Milliseconds of each operator in the fastest run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if kernels and not register_kernels(options):
        raise RuntimeError("the kernels do not run here: see the log")
    options.enable_profiling = True
    options.profile_file_prefix = str(graph.with_name("profile"))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for _ in range(RUNS):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    best = min(runs, key=lambda event: event["dur"])
    operators: Counter[str] = Counter()
    for event in events:
        inside = best["ts"] <= event["ts"] <= best["ts"] + best["dur"]
        # Nodes in a branch of an If have their own events.
        if inside and event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "If":
            operators[event["args"]["op_name"]] += event["dur"]
    return {
        "milliseconds": round(best["dur"] / 1000, 1),
        "tokens_per_second": round(ids.size / best["dur"] * 1e6, 1),
        "nodes_ms": round(operators.total() / 1000, 1),
        "products_share": round(operators[PRODUCTS] / best["dur"], 3),
        "operators": {name: round(us / 1000, 1) for name, us in operators.most_common()},
    }


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]))))
