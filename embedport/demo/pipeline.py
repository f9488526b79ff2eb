"""The main job on a built-in pair of checkpoints: export, run, validate.

The pair has random weights, so its answers mean nothing; that the artifact gives the reference's
answers means the same as for a trained model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..exporters import export
from ..runtimes import Embedder, Ranked, Reranker, load
from ..spec import Task
from .samples import builtin_pairs, builtin_samples
from .synthetic import Geometry, train_tokenizer, write_checkpoint

if TYPE_CHECKING:
    import numpy as np

    from ..validation import Report

# A hundredth of the 0.6B model in each direction that matters: grouped heads wider than the
# hidden size divided by their number.
GEOMETRY = Geometry(128, 4, 8, 2, 32, 384)
VOCABULARY = 2048
QUERIES = ["What is the capital of China?", "Explain gravity"]
DOCUMENTS = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun.",
]
TASKS: tuple[Task, ...] = ("embedding", "reranker")
PRECISIONS = ("fp32", "fp16")
MARKER = "demo.txt"


@dataclass(frozen=True)
class Demo:
    """What the demo made and found.

    Attributes:
        artifacts: What was exported, each task in each precision.
        similarities: float32 [2, 2], QUERIES by DOCUMENTS.
        query: The query that was reranked.
        ranking: Its documents.
        reports: The validations; empty where torch is not installed.
    """

    artifacts: list[Path]
    similarities: np.ndarray
    query: str
    ranking: list[Ranked]
    reports: list[Report]


def run_demo(folder: Path, say: Callable[[str], None]) -> Demo:
    """Make the pair, export both, run both, validate both.

    Args:
        folder: Made, or replaced if an earlier demo made it.
        say: Called with a line before each step.

    Raises:
        InputError: The folder exists and is not an earlier demo's.
    """
    _prepare(folder)
    say("Making a small embedder and reranker with random weights, in the hub's layout")
    tokenizer = train_tokenizer([sample.text for sample in builtin_samples()], VOCABULARY)
    checkpoints = folder / "checkpoints"
    artifacts: dict[Path, Path] = {}
    for seed, task in enumerate(TASKS):
        checkpoint = write_checkpoint(checkpoints / task, GEOMETRY, task, tokenizer, seed=seed)
        for precision in PRECISIONS:
            say(f"Exporting the {task} checkpoint to ONNX in {precision}")
            artifact = export(checkpoint, folder / f"{task}-{precision}", precision=precision)
            artifacts[artifact.folder] = checkpoint
    say("Running both in fp32")
    embedder, reranker = (load(folder / f"{task}-fp32") for task in TASKS)
    assert isinstance(embedder, Embedder)
    assert isinstance(reranker, Reranker)
    queries = embedder.encode(QUERIES, prompt="query")
    documents = embedder.encode(DOCUMENTS)
    query = builtin_pairs()[0].query
    ranking = reranker.rank(query, [p.document for p in builtin_pairs() if p.query == query])
    reports = _validate(artifacts, say)
    return Demo(list(artifacts), queries @ documents.T, query, ranking, reports)


def _validate(artifacts: dict[Path, Path], say: Callable[[str], None]) -> list[Report]:
    """Each artifact against its checkpoint."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return []
    from ..validation import validate

    reports = []
    for artifact, checkpoint in artifacts.items():
        say(f"Validating {artifact.name} against transformers")
        reports.append(validate(artifact, checkpoint))
    return reports


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
