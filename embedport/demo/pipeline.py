"""The main job on the built-in pair of checkpoints: export, search, rerank, validate, report."""

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
from ..runtimes import Embedder, Ranked, Reranker, load
from ..spec import Task

if TYPE_CHECKING:
    from ..validation import Report

CHECKPOINTS: dict[Task, str] = {"embedding": "embedder", "reranker": "reranker"}
PRECISIONS = ("fp32", "int8")
QUERIES = ("fierce, savage", "a device for measuring temperature", "to travel through water")
CANDIDATES = 50
SHOWN = 3
# Pairs cost more than texts: enough queries to see a loss, few enough for a minute.
RERANKED_QUERIES = 60
MARKER = "demo.txt"
NEEDED = ("torch", "transformers", "ir_measures", "jinja2", "matplotlib")


@dataclass(frozen=True)
class Answer:
    """What was found for a query: by cosine among all documents, and reranked."""

    query: str
    found: list[Ranked]
    reranked: list[Ranked]


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


def builtin_checkpoint(task: Task) -> Path:
    """The folder of the built-in embedder or reranker, in the hub's layout.

    Raises:
        InputError: This installation came without it.
    """
    folder = Path(str(files("embedport") / "demo" / CHECKPOINTS[task]))
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is missing: this installation came without the demo pair")
    return folder


def run_demo(folder: Path, say: Callable[[str], None]) -> Demo:
    """Export both models, search and rerank with them, validate them.

    Args:
        folder: Made, or replaced if an earlier demo made it.
        say: Called with a line before each step.

    Raises:
        InputError: The folder exists and is not an earlier demo's.
    """
    _prepare(folder)
    artifacts: dict[Path, Path] = {}
    for task in CHECKPOINTS:
        checkpoint = builtin_checkpoint(task)
        for precision in PRECISIONS:
            say(f"Exporting the {CHECKPOINTS[task]} to ONNX in {precision}")
            artifact = export(checkpoint, folder / f"{task}-{precision}", precision=precision)
            artifacts[artifact.folder] = checkpoint
    documents, answers = _answer(folder, say)
    reports, pages = _validate(artifacts, folder, say)
    return Demo(list(artifacts), documents, answers, reports, pages)


def _answer(folder: Path, say: Callable[[str], None]) -> tuple[int, list[Answer]]:
    """Search the built-in documents in int8, and rerank the best."""
    from ..validation.beir import BUILTIN, read_beir

    embedder, reranker = (load(folder / f"{task}-int8") for task in CHECKPOINTS)
    assert isinstance(embedder, Embedder)
    assert isinstance(reranker, Reranker)
    documents = list(read_beir(BUILTIN).documents.values())
    say(f"Searching {len(documents):,} documents in int8")
    vectors = embedder.encode(documents)
    answers = []
    for query, scores in zip(
        QUERIES, embedder.encode(QUERIES, prompt="query") @ vectors.T, strict=True
    ):
        best = np.argsort(-scores, kind="stable")[:CANDIDATES]
        found = [Ranked(int(i), float(scores[i]), documents[i]) for i in best]
        reranked = reranker.rank(query, [each.document for each in found], top_k=SHOWN)
        answers.append(Answer(query, found[:SHOWN], reranked))
    return len(documents), answers


def _validate(
    artifacts: dict[Path, Path], folder: Path, say: Callable[[str], None]
) -> tuple[list[Report], list[Path]]:
    """Each artifact against its checkpoint, retrieval included, with a page each."""
    if not all(find_spec(name) for name in NEEDED):
        return [], []
    from ..validation import validate
    from ..validation.beir import BUILTIN, read_beir

    whole, few = read_beir(BUILTIN), read_beir(BUILTIN, max_queries=RERANKED_QUERIES)
    reports, pages = [], []
    for artifact, checkpoint in artifacts.items():
        say(f"Validating {artifact.name} against transformers")
        data = whole if artifact.name.startswith("embedding") else few
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
