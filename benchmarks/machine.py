"""Saving and printing of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from embedport.bench.machine import cpu_kind, describe
from embedport.errors import InputError

RESULTS = Path(__file__).parent / "results"


def read_kept(path: Path, machines: Callable[[dict[str, Any]], Iterable[Any]]) -> dict[str, Any]:
    """Read the figures of earlier runs from a file that this run adds to; empty without a file.

    Call it before measuring: a file holds figures of only one kind of CPU.

    Args:
        path: The file.
        machines: Extracts the file's machines, each from `describe`.

    Raises:
        InputError: A machine in the file has another kind of CPU than this one.
    """
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    here = cpu_kind(describe())
    if others := [kind for kind in map(cpu_kind, machines(saved)) if kind != here]:
        raise InputError(
            f"{path} holds figures of {others[0]}, and this is {here}: give another folder with "
            "--out, or delete the file"
        )
    return saved


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
