"""What a measurement ran on, and where its result is kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
PACKAGES = ("embedport", "onnxruntime", "numpy", "onnx-ir")


def describe() -> dict[str, Any]:
    """Processor, cores, memory in bytes, packages and the day."""
    cpu, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags.split()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def save(name: str, figures: dict[str, Any], results: Path = RESULTS) -> None:
    """Write {name}.json into the results folder."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **figures}, indent=2) + "\n")
    print(f"wrote {path}")


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(str(cell) for cell in row), "|")
