"""Builds of TensorRT for RTX, which need no GPU: layers, time, peak memory and size.

    python -m benchmarks.engines GRAPH PLAN

builds one engine, in a process of its own, and prints one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from embedport.demo.pipeline import builtin_embedder
from embedport.exporters.tensorrt import PROFILES
from embedport.exporters.tensorrt.build import build_engine, parse
from embedport.exporters.tensorrt.export import PRECISIONS
from embedport.exporters.tensorrt.options import EngineOptions
from embedport.machine.engine import Profile
from embedport.machine.gpu import load_tensorrt, make_logger

from .checkpoint import CACHE, checkpoint, require_space
from .machine import RESULTS, print_table, read_kept, save
from .process import ours, run

NAME = "engines-rtx"
COLUMNS = ("seconds", "cpu_seconds", "peak_gb", "weights_gb", "engine_gb")
INPUTS = ("input_ids", "attention_mask")
# Bytes of 8B's checkpoint. Its graph and its engine are as large in 16 bits, half of it in fewer.
SPACE_8B = 16_500_000_000
OTHER_SPACE = 10_000_000_000


def build_rtx_engines(
    geometries: list[str], precisions: list[str] | None = None, results: Path = RESULTS
) -> None:
    """Export and build each precision of each geometry; figures of earlier runs are kept.

    Args:
        geometries: "demo", or geometries of `checkpoint`.
        precisions: All by default.
        results: Folder of the results.
    """
    path = results / f"{NAME}.json"
    rows = read_kept(path, lambda saved: [saved["machine"]]).get("builds", {})
    for geometry in geometries:
        for precision in precisions or PRECISIONS:
            rows[f"{geometry} {precision}"] = _build(geometry, precision)
            save(NAME, {"profiles": PROFILES, "builds": rows}, results)
    _print(rows)


def _build(geometry: str, precision: str) -> dict[str, Any]:
    copies = 3 if precision in ("fp16", "bf16") else 2
    require_space(copies * SPACE_8B if geometry == "8b" else OTHER_SPACE)
    source = builtin_embedder() if geometry == "demo" else checkpoint(geometry)
    folder = CACHE / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--arithmetic", "bf16"] if precision in ("int8", "int4") else []
    options += ["--fast"] if precision == "int4" else []  # the codes do not matter to a build
    run(
        ours(
            *("export", "onnx", str(source), "-o", str(folder), "--dialect", "standard"),
            *("--precision", precision, *options),
        )
    )
    graph, plan = folder / "onnx" / "model.onnx", folder / "engine" / "model.plan"
    built = run([sys.executable, "-m", "benchmarks.engines", str(graph), str(plan)])
    facts = json.loads(built.output.strip().splitlines()[-1])
    weights = graph.with_name("model.onnx_data").stat().st_size
    size = plan.stat().st_size
    shutil.rmtree(folder)
    return {
        **facts,
        "peak_gb": round(built.peak_bytes / 1e9, 2),
        "weights_gb": round(weights / 1e9, 3),
        "engine_gb": round(size / 1e9, 3),
    }


def _print(rows: dict[str, Any]) -> None:
    print_table(
        ["", "layers", "products", "s", "CPU s", "peak GB", "weights GB", "engine GB"],
        [
            [
                name,
                row["layers"],
                ", ".join(f"{count} {kind}" for kind, count in row["products"].items()),
                *(row[key] for key in COLUMNS),
            ]
            for name, row in rows.items()
        ],
    )


def build(graph: Path, plan: Path) -> dict[str, Any]:
    """Build an engine with the default profiles and return what is known of the build."""
    trt = load_tensorrt("tensorrt-rtx")
    builder = trt.Builder(logger := make_logger(trt, lambda message, is_error: None))
    layers = parse(trt, "tensorrt-rtx", builder, logger, graph).num_layers
    del builder
    options = EngineOptions(tuple(map(Profile.parse, PROFILES)))
    start, cpu = time.perf_counter(), time.process_time()
    record = build_engine(
        "tensorrt-rtx", graph, plan, plan.name, INPUTS, options, lambda phase, done, total: None
    )
    return {
        "library": record.builder,
        "layers": layers,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "products": dict(record.products),
    }


if __name__ == "__main__":
    print(json.dumps(build(*map(Path, sys.argv[1:]))), flush=True)
