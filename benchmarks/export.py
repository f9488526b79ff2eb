"""Export of the 0.6B geometry against the peer's traced export, and of the 8B geometry."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

from .checkpoint import CACHE, checkpoint
from .machine import save
from .process import Run, ours, peer, run


def against_peer(rounds: int) -> None:
    """fp32, rounds interleaved: wall time and peak memory of the whole process."""
    source = str(checkpoint("0.6b"))
    run(peer("optimum_onnx.py", "warm"))
    commands = {
        "embedport": lambda out: ours("export", "onnx", source, "-o", out),
        "optimum-onnx": lambda out: peer("optimum_onnx.py", "export", source, out),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            out = CACHE / f"fp32-{name}"
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(run(command(str(out))))
    figures = {name: _summary(each) for name, each in runs.items()}
    ratio = figures["optimum-onnx"]["seconds"] / figures["embedport"]["seconds"]
    save("export-0.6b", {"rounds": rounds, **figures, "times_faster": round(ratio, 2)})


def large(precision: str) -> None:
    """The 8B geometry, 16 GB of bf16 shards."""
    source = str(checkpoint("8b"))
    out = CACHE / f"8b-{precision}"
    shutil.rmtree(out, ignore_errors=True)
    try:
        found = run(ours("export", "onnx", source, "-o", str(out), "--precision", precision))
        save(f"export-8b-{precision}", {"embedport": _summary([found]), "bytes": _bytes(out)})
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _summary(runs: list[Run]) -> dict[str, Any]:
    return {
        "seconds": round(median(each.seconds for each in runs), 2),
        "all_seconds": [round(each.seconds, 2) for each in runs],
        "peak_gb": round(max(each.peak_bytes for each in runs) / 1e9, 3),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
