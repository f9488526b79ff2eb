"""Where results are kept, and how they are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedport.bench.machine import describe

RESULTS = Path(__file__).parent / "results"


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
