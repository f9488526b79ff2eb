"""Everything that a validation refuses or warns about before it runs anything."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.hub import fetch
from ..checkpoint.quantization_config import LibraryQuantization
from ..checkpoint.spec import Task
from ..errors import ArtifactError, InputError, require
from ..files import MANIFEST
from ..runtimes import ModelInfo
from ..texts.beir import RetrievalSet, read_beir
from ..texts.ranking import candidate_pairs
from .advice import other_weights
from .recorded_file import is_recorded
from .reference import Origin
from .tasks import AnyTask, EmbeddingTask, RerankerTask

logger = logging.getLogger(__name__)


def check_packages(
    reference: str | Path,
    *,
    page: str | Path | None,
    retrieval: str | Path | RetrievalSet | None,
    mteb: Sequence[Any] | None,
) -> None:
    """Fail now rather than after hours of work.

    Raises:
        MissingPackageError: A package that an option needs is not installed.
        InputError: MTEB's tasks are asked of a recorded reference, or the page has no place.
    """
    if page is not None:
        check_place(Path(page))
        require("jinja2", "report")
        require("matplotlib", "report")
    if retrieval is not None:
        require("ir_measures", "retrieval")
    if mteb is not None:
        if is_recorded(reference):
            raise InputError(
                f"{reference} is a recorded reference, which has no results of MTEB's tasks: give "
                "the checkpoint itself"
            )
        require("mteb", "mteb")


def check_place(path: Path) -> None:
    """Refuse a file that could not be written later.

    Raises:
        InputError: It is a folder, or in none.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")


def find_recorded(artifact: str | Path) -> Path | None:
    """The folder with the manifest and model card to write a validation's figures into.

    Args:
        artifact: An artifact or a checkpoint, as for `validate`.

    Returns:
        The folder. None for a checkpoint without a manifest, and, with a warning, for a folder in
        the hub's cache, which must stay as published.

    Raises:
        InputError: No such folder or hub id.
        CheckpointError: The hub does not have it, or cannot be reached.
        ArtifactError: The folder cannot be written to.
    """
    source = fetch(artifact)
    if not (source.folder / MANIFEST).is_file():
        return None
    if source.is_cached:
        logger.warning(
            "%s is in the hub's cache, so its figures are not recorded: to record them, validate a "
            "copy of the folder",
            artifact,
        )
        return None
    if not os.access(source.folder, os.W_OK):
        raise ArtifactError(
            f"{source.folder} is read-only, so the figures cannot be recorded in it: make it "
            "writable, or validate with `record=False`"
        )
    return source.folder


def check_layers(info: ModelInfo) -> None:
    """Require what the page's table by layer runs in: transformers' own layers.

    Raises:
        MissingPackageError: The library of a quantized checkpoint is not installed.
    """
    quantization = info.checkpoint and info.checkpoint.quantization
    if isinstance(quantization, LibraryQuantization):
        from ..runtimes.checkpoint import require_library

        require_library(quantization)


def choose_set(
    retrieval: str | Path | RetrievalSet | None, *, task: Task, save_run: str | Path | None = None
) -> RetrievalSet | None:
    """Read the retrieval set, and check that the task can use it.

    Returns:
        None if none is asked for.

    Raises:
        InputError: `save_run` has nothing to write or no place, the set cannot be read, or it has
            no candidates that a reranker needs.
    """
    if save_run is not None:
        if retrieval is None or task == "reranker":
            raise InputError(
                "`save_run` writes what an embedding artifact finds: give `retrieval` too"
            )
        check_place(Path(save_run))
    if retrieval is None or isinstance(retrieval, RetrievalSet):
        data = retrieval
    else:
        data = read_beir(retrieval)
    if data is not None and task == "reranker":
        candidate_pairs(data)  # fail now rather than after hours of work
    return data


def check_limits(
    task: AnyTask,
    measured: bool,
    min_cosine: float | None,
    max_score_difference: float | None,
    max_ndcg_loss: float | None,
) -> None:
    """Refuse a limit that no gate would check.

    Args:
        task: The inputs.
        measured: Whether a retrieval set or MTEB's tasks are measured.
        min_cosine: The caller's limits; None for those that were not given.
        max_score_difference: See `min_cosine`.
        max_ndcg_loss: See `min_cosine`.

    Raises:
        InputError: A limit is given that nothing here is measured against.
    """
    if min_cosine is not None and isinstance(task, RerankerTask):
        raise InputError("a reranker gives scores, not vectors: `max_score_difference` limits them")
    if max_score_difference is not None and isinstance(task, EmbeddingTask):
        kinds = set(task.is_query.tolist())
        if len(kinds) == 1:
            raise InputError(
                "`max_score_difference` limits the scores of queries and documents, found "
                f"{'queries' if kinds.pop() else 'documents'} only: give texts of both kinds, each "
                "with its prompt"
            )
    if max_ndcg_loss is not None and not measured:
        raise InputError(
            "`max_ndcg_loss` limits what is lost on a set or a task: give `retrieval` or `mteb` too"
        )


def check_same_model(info: ModelInfo, origin: Origin) -> None:
    """Refuse a reference of other sizes.

    Raises:
        InputError: `hidden_size` or `vocab_size` differs.
    """
    sizes = (info.hidden_size, info.vocab_size)
    if sizes != (origin.hidden_size, origin.vocab_size):
        raise InputError(
            f"the artifact was made from {info.source}, with hidden_size and vocab_size "
            f"{sizes}; the reference {origin.id} has {(origin.hidden_size, origin.vocab_size)}"
        )


def compare_weights(info: ModelInfo, origin: Origin) -> None:
    """Warn if the artifact was made from other weight files than the reference's.

    Raises:
        InputError: The reference is recorded and its weight files differ.
    """
    difference = other_weights(info, origin)
    if difference and origin.recorded is not None:
        raise InputError(f"{difference}: record a reference of the artifact's checkpoint")
    if difference:
        logger.warning("%s: the comparison may be between two different models", difference)
