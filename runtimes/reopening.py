"""Pickled models: a recipe that opens them again from their folder.

A session or a torch model cannot be pickled, and its weights should not be. Ray, multiprocessing
and joblib send the recipe instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.spec import Task
from ..errors import InputError
from .info import ModelInfo, hash_model

if TYPE_CHECKING:
    from .embedder import Embedder
    from .reranker import Reranker

Reopening = tuple[str, str | None, Task, str, int, str | None]


def reopening(info: ModelInfo, device: str, max_length: int) -> Reopening:
    """The recipe of `reopen`: folder, adapter's folder, task, device, length, hash of the files.

    The hash is None for a checkpoint without a manifest: computing it would read all weights.

    Args:
        info: The model's description.
        device: The device it runs on.
        max_length: Texts are cut to this many tokens.
    """
    folder, adapter = info.folder, None
    if info.checkpoint is not None:
        source = info.checkpoint.source
        folder = source.folder
        adapter = None if source.adapter is None else str(source.adapter.folder)
    sha256 = None if info.artifact is None else hash_model(info)
    return str(folder), adapter, info.task, device, max_length, sha256


def reopen(recipe: Reopening, ranges: Mapping[str, Any] | None = None) -> Embedder | Reranker:
    """Open a model again: as `load`.

    Args:
        recipe: From `reopening`.
        ranges: An embedder's ranges, if they were measured after it was opened.

    Raises:
        InputError: The folder holds another artifact than when the model was pickled.
    """
    from . import load
    from .embedder import Embedder

    folder, adapter, task, device, max_length, sha256 = recipe
    runner = load(Path(folder), device=device, max_length=max_length, task=task, adapter=adapter)
    if sha256 not in (None, hash_model(runner.info)):
        raise InputError(
            f"{folder} holds another artifact than when the model was pickled: load it again, or "
            "give this process the same folder"
        )
    if isinstance(runner, Embedder):
        runner.ranges = ranges
    return runner
