"""The demo: export the two built-in checkpoints, search, rerank, and validate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.spec import TASKS
from ..errors import InputError, require
from ..exporters import export
from ..runtimes import Ranked, load_embedder, load_reranker
from ..texts.beir import BUILTIN, read_beir

if TYPE_CHECKING:
    from ..validation import Report

PRECISIONS = ("fp32", "int8")
QUERIES = ("happy, joyful", "a boat with sails", "to speak very quietly")
SHOWN = 3
# Search results that the reranker scores.
CANDIDATES = 50
# Number of queries on which reranking is measured, fifty pairs each, every one with the whole
# template. fp32 gives the reference's order; with fewer queries, int8's noise would come close to
# the limit.
RERANKED_QUERIES = {"reranker-fp32": 50, "reranker-int8": 200}
MARKER = "demo.txt"
NEEDED = ("ir_measures", "jinja2", "matplotlib")


@dataclass(frozen=True)
class Answer:
    """The results for a query, best first.

    Attributes:
        query: The query.
        found: The best of all documents by cosine.
        reranked: The best of the first 50 by the reranker's score.
    """

    query: str
    found: list[Ranked]
    reranked: list[Ranked]


@dataclass(frozen=True)
class Demo:
    """The demo's artifacts and results.

    Attributes:
        artifacts: Folders of the exported artifacts, one per task and precision.
        documents: Number of documents searched.
        answers: One for each of `QUERIES`.
        reports: The validations against the results of the checkpoints' own libraries; empty if a
            package that they need is not installed.
        pages: The reports' HTML pages.
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
    return _builtin("embedder")


def builtin_reranker() -> Path:
    """The folder of the trained reranker, in the hub's layout.

    Raises:
        InputError: This installation came without it.
    """
    return _builtin("reranker")


def _builtin(name: str) -> Path:
    folder = Path(str(files("embedport") / "demo" / name))
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is missing: this installation came without the demo's models")
    return folder


def builtin_reference(checkpoint: Path) -> Path:
    """The recorded reference of a built-in checkpoint: its own library's results.

    Made by `embedport reference CHECKPOINT -o FILE --device cpu --retrieval builtin`; for the
    reranker with `--max-queries 200`.
    """
    return checkpoint.with_name(f"{checkpoint.name}.reference")


def run_demo(folder: Path, say: Callable[[str], None], *, live: bool = False) -> Demo:
    """Export both models, search, rerank, validate.

    Args:
        folder: The output folder; it is created, or replaced if an earlier demo made it.
        say: Called with a line before each step.
        live: Whether to run the checkpoints' own libraries, in torch, as the reference, instead of
            using their recorded results.

    Raises:
        InputError: The folder exists and is not an earlier demo's.
        MissingPackageError: onnxruntime, or with `live` what runs the reference, is not installed.
    """
    require("onnxruntime", "cpu")
    if live:
        for package in ("torch", "transformers", "sentence_transformers"):
            require(package, "torch")
    _prepare(folder)
    artifacts: dict[Path, Path] = {}
    for task, checkpoint in zip(TASKS, (builtin_embedder(), builtin_reranker()), strict=True):
        for precision in PRECISIONS:
            say(f"Exporting the {task} model to ONNX in {precision}")
            artifact = export(checkpoint, folder / f"{task}-{precision}", precision=precision)
            artifacts[artifact.folder] = checkpoint
    documents, answers = _answer(folder, say)
    reports, pages = _validate(artifacts, folder, say, live)
    return Demo(list(artifacts), documents, answers, reports, pages)


def _answer(folder: Path, say: Callable[[str], None]) -> tuple[int, list[Answer]]:
    """Search the built-in documents and rerank the results, in int8."""
    embedder = load_embedder(folder / "embedding-int8")
    reranker = load_reranker(folder / "reranker-int8")
    documents = list(read_beir(BUILTIN).documents.values())
    say(f"Searching {len(documents):,} documents in int8")
    scores = embedder.encode(QUERIES, prompt="query") @ embedder.encode(documents).T
    answers = []
    for query, row in zip(QUERIES, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:CANDIDATES]
        results = [Ranked(int(i), float(row[i]), documents[i]) for i in best]
        reranked = reranker.rank(query, [ranked.document for ranked in results], top_k=SHOWN)
        answers.append(Answer(query, results[:SHOWN], reranked))
    return len(documents), answers


def _validate(
    artifacts: dict[Path, Path], folder: Path, say: Callable[[str], None], live: bool
) -> tuple[list[Report], list[Path]]:
    """Validate each artifact against its checkpoint, retrieval included, and write its page."""
    if not all(find_spec(name) for name in NEEDED):
        return [], []
    from ..validation import validate

    reports, pages = [], []
    for artifact, checkpoint in artifacts.items():
        reference = checkpoint if live else builtin_reference(checkpoint)
        say(f"Validating {artifact.name} against {'its checkpoint' if live else reference.name}")
        data = read_beir(BUILTIN, max_queries=RERANKED_QUERIES.get(artifact.name))
        pages.append(artifact.with_name(f"{artifact.name}.html"))
        command = ["embedport", "demo", "-o", str(folder), *(["--live"] if live else [])]
        reports.append(
            validate(artifact, reference, retrieval=data, page=pages[-1], command=command)
        )
    return reports, pages


def _prepare(folder: Path) -> None:
    if folder.exists() and not (folder / MARKER).is_file():
        raise InputError(f"{folder} exists and is not an earlier demo's; choose another place")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The marker stays: a run that is stopped here must not leave a folder that none replaces.
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARKER:
                path.unlink()
        (folder / MARKER).write_bytes(b"Made by `embedport demo`, which replaces this folder.\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror or error}") from error
