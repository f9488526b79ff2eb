"""The main job on two small checkpoints: export, search, rerank, validate, report.

The embedder is trained and ships with embedport. The reranker has random weights: its scores mean
nothing, but that an artifact gives the reference's scores means what it does for a trained one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..exporters import export
from ..prompts import load_tokenizer
from ..runtimes import Embedder, Ranked, load
from ..spec import Task
from .synthetic import Geometry, write_checkpoint

if TYPE_CHECKING:
    from ..validation import Report

TASKS: tuple[Task, ...] = ("embedding", "reranker")
GEOMETRY = Geometry(128, 4, 8, 2, 32, 384)
PRECISIONS = ("fp32", "int8")
QUERIES = ("fierce, savage", "a device for measuring temperature", "to travel through water")
SHOWN = 3
MARKER = "demo.txt"
NEEDED = ("torch", "transformers", "ir_measures", "jinja2", "matplotlib")


@dataclass(frozen=True)
class Answer:
    """What was found for a query by cosine among all documents, the best first."""

    query: str
    found: list[Ranked]


@dataclass(frozen=True)
class Demo:
    """What the demo made and found.

    Attributes:
        artifacts: What was exported, each task in each precision.
        documents: How many documents were searched.
        answers: One for each of `QUERIES`.
        reports: The validations; empty where a package that they need is not installed.
        pages: Their HTML pages.
    """

    artifacts: list[Path]
    documents: int
    answers: list[Answer]
    reports: list[Report]
    pages: list[Path]


def builtin_embedder() -> Path:
    """The folder of the trained embedder, in the hub's layout.

    Raises:
        InputError: This installation came without it.
    """
    folder = Path(str(files("embedport") / "demo" / "embedder"))
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is missing: this installation came without the demo embedder")
    return folder


def run_demo(folder: Path, say: Callable[[str], None]) -> Demo:
    """Export both models, search, validate.

    Args:
        folder: Made, or replaced if an earlier demo made it.
        say: Called with a line before each step.

    Raises:
        InputError: The folder exists and is not an earlier demo's.
    """
    _prepare(folder)
    artifacts: dict[Path, Path] = {}
    tokenizer = load_tokenizer(builtin_embedder() / "tokenizer.json")
    reranker = write_checkpoint(folder / "reranker", GEOMETRY, "reranker", tokenizer)
    for task, checkpoint in zip(TASKS, (builtin_embedder(), reranker), strict=True):
        for precision in PRECISIONS:
            say(f"Exporting the {task} model to ONNX in {precision}")
            artifact = export(checkpoint, folder / f"{task}-{precision}", precision=precision)
            artifacts[artifact.folder] = checkpoint
    documents, answers = _answer(folder, say)
    reports, pages = _validate(artifacts, folder, say)
    return Demo(list(artifacts), documents, answers, reports, pages)


def _answer(folder: Path, say: Callable[[str], None]) -> tuple[int, list[Answer]]:
    """Search the built-in documents in int8."""
    from ..beir import BUILTIN, read_beir

    embedder = load(folder / "embedding-int8")
    assert isinstance(embedder, Embedder)
    documents = list(read_beir(BUILTIN).documents.values())
    say(f"Searching {len(documents):,} documents in int8")
    scores = embedder.encode(QUERIES, prompt="query") @ embedder.encode(documents).T
    answers = []
    for query, row in zip(QUERIES, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:SHOWN]
        answers.append(Answer(query, [Ranked(int(i), float(row[i]), documents[i]) for i in best]))
    return len(documents), answers


def _validate(
    artifacts: dict[Path, Path], folder: Path, say: Callable[[str], None]
) -> tuple[list[Report], list[Path]]:
    """Each artifact against its checkpoint, retrieval included, with a page each."""
    if not all(find_spec(name) for name in NEEDED):
        return [], []
    from ..beir import BUILTIN
    from ..validation import validate

    reports, pages = [], []
    for artifact, checkpoint in artifacts.items():
        say(f"Validating {artifact.name} against transformers")
        data = BUILTIN if checkpoint == builtin_embedder() else None
        pages.append(folder / f"{artifact.name}.html")
        command = ["embedport", "demo", "-o", str(folder)]
        reports.append(
            validate(artifact, checkpoint, retrieval=data, page=pages[-1], command=command)
        )
    return reports, pages


def _prepare(folder: Path) -> None:
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise InputError(f"{folder} exists and is not an earlier demo's; choose another place")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("Made by `embedport demo`, which replaces this folder.\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from error
