"""Where results are kept, and how they are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from embedport.bench.machine import cpu_kind, describe
from embedport.errors import InputError

RESULTS = Path(__file__).parent / "results"


def read_kept(path: Path, machines: Callable[[dict[str, Any]], Iterable[Any]]) -> dict[str, Any]:
    """Figures of earlier runs in a file that this run adds to; empty where there is none.

    Called before anything is measured: a file holds figures of one kind of CPU.

    Args:
        path: The file.
        machines: Gives the machines in it, each as `describe` found it.

    Raises:
        InputError: One of them is another kind of CPU than this.
    """
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    here = cpu_kind(describe())
    if other := [kind for kind in map(cpu_kind, machines(kept)) if kind != here]:
        raise InputError(
            f"{path} holds figures of {other[0]}, and this is {here}: give another folder with "
            "--out, or delete the file"
        )
    return kept


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
