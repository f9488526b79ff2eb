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
MARKER = "demo.txt"


@dataclass(frozen=True)
class Demo:
    """What the demo made and found.

    Attributes:
        folder: Where everything is.
        similarities: float32 [2, 2], QUERIES by DOCUMENTS.
        query: The query that was reranked.
        ranking: Its documents.
        reports: The validations; empty where torch is not installed.
    """

    folder: Path
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
    write_checkpoint(checkpoints / "embedding", GEOMETRY, "embedding", tokenizer)
    write_checkpoint(checkpoints / "reranker", GEOMETRY, "reranker", tokenizer, seed=1)
    for task in ("embedding", "reranker"):
        say(f"Exporting the {task} checkpoint to ONNX")
        export(checkpoints / task, folder / task)
    say("Running both")
    embedder, reranker = (load(folder / task) for task in ("embedding", "reranker"))
    assert isinstance(embedder, Embedder)
    assert isinstance(reranker, Reranker)
    queries = embedder.encode(QUERIES, prompt="query")
    documents = embedder.encode(DOCUMENTS)
    query = builtin_pairs()[0].query
    ranking = reranker.rank(query, [p.document for p in builtin_pairs() if p.query == query])
    return Demo(folder, queries @ documents.T, query, ranking, _validate(folder, say))


def _validate(folder: Path, say: Callable[[str], None]) -> list[Report]:
    if find_spec("torch") is None or find_spec("transformers") is None:
        say("Not validating: torch is missing; pip install 'embedport[torch]'")
        return []
    from ..validation import validate

    reports = []
    for task in ("embedding", "reranker"):
        say(f"Validating the {task} artifact against transformers")
        reports.append(validate(folder / task, folder / "checkpoints" / task))
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
