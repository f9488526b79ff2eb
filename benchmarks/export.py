"""Export of the 0.6B geometry, compared with the peer's traced export, and of the 8B geometry."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

from embedport.bench.runners import install_peer

from .checkpoint import CACHE, checkpoint, require_space
from .machine import RESULTS, print_table, save
from .process import Run, ours, run

# Disk space for the 8B geometry: a checkpoint of 16 GB; an export is as large, in fp32 twice.
CHECKPOINT_BYTES = 17_000_000_000
EXPORT_BYTES = {"fp32": 34_000_000_000}
VARIANTS = {
    **{name: ["--precision", name] for name in ("fp32", "fp16", "bf16", "int8", "int8-weight")},
    "int4, fast": ["--precision", "int4", "--fast"],
    "int4": ["--precision", "int4"],
    "int4, gptq": ["--precision", "int4", "--algorithm", "gptq"],
}


def compare_with_peer(rounds: int, source: Path | None = None, results: Path = RESULTS) -> None:
    """fp32 export in interleaved rounds: wall time and peak memory of the whole process."""
    source = source or checkpoint("0.6b")
    peer = install_peer("optimum_onnx.py")
    commands = {
        "embedport": lambda out: ours(
            "export", "onnx", str(source), "-o", out, "--precision", "fp32"
        ),
        "optimum-onnx": lambda out: [*peer.command, "prepare", "fp32", str(source), out],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name in sorted(commands, reverse=number % 2 == 1):
            out = CACHE / f"fp32-{name}"
            shutil.rmtree(out, ignore_errors=True)
            finished = run(commands[name](str(out)))
            if number > 0:  # the first round reads the checkpoint from the disk, for both
                runs[name].append(finished)
    figures = {name: _summary(finished) for name, finished in runs.items()}
    ratio = figures["optimum-onnx"]["seconds"] / figures["embedport"]["seconds"]
    print_table(
        ["fp32 export", "median s", "from", "to", "peak GB"],
        [
            [
                name,
                row["seconds"],
                min(row["all_seconds"]),
                max(row["all_seconds"]),
                row["peak_gb"],
            ]
            for name, row in figures.items()
        ],
    )
    save(
        "export-0.6b",
        {"rounds": rounds, "peer": peer.versions, **figures, "times_faster": round(ratio, 2)},
        results,
    )


def measure_precisions(source: Path | None = None, results: Path = RESULTS) -> None:
    """Time, peak memory and size at each precision; "gptq" includes running calibration texts."""
    source = source or checkpoint("0.6b")
    figures = {}
    for name, options in VARIANTS.items():
        out = CACHE / "precision"
        shutil.rmtree(out, ignore_errors=True)
        finished = run(ours("export", "onnx", str(source), "-o", str(out), *options))
        figures[name] = _summary([finished]) | {"bytes": _bytes(out)}
    shutil.rmtree(CACHE / "precision", ignore_errors=True)
    print_table(
        ["0.6B export", "s", "peak GB", "artifact GB"],
        [
            [name, row["seconds"], row["peak_gb"], round(row["bytes"] / 1e9, 3)]
            for name, row in figures.items()
        ],
    )
    save("export-0.6b-precisions", figures, results)


def measure_8b(precision: str, source: Path | None = None, results: Path = RESULTS) -> None:
    """Export of the 8B geometry, from 16 GB of bf16 shards."""
    out = CACHE / f"8b-{precision}"
    shutil.rmtree(out, ignore_errors=True)
    exists = source is not None or (CACHE / "embedding-8b" / "made").exists()
    export_bytes = EXPORT_BYTES.get(precision, CHECKPOINT_BYTES)
    require_space(export_bytes if exists else CHECKPOINT_BYTES + export_bytes)
    source = source or checkpoint("8b")
    try:
        fast = ["--fast"] if precision == "int4" else []  # calibration takes hours at this size
        finished = run(
            ours("export", "onnx", str(source), "-o", str(out), "--precision", precision, *fast)
        )
        figures = _summary([finished]) | {"bytes": _bytes(out)}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print_table(
        [f"{precision} export", "s", "peak GB", "artifact GB"],
        [["embedport", figures["seconds"], figures["peak_gb"], round(figures["bytes"] / 1e9, 2)]],
    )
    save(f"export-8b-{precision}", {"embedport": figures}, results)


def _summary(runs: list[Run]) -> dict[str, Any]:
    return {
        "seconds": round(median(run.seconds for run in runs), 2),
        "all_seconds": [round(run.seconds, 2) for run in runs],
        "peak_gb": round(max(run.peak_bytes for run in runs) / 1e9, 3),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
