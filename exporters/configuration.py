"""Fetch a checkpoint in two steps: the configuration, then, once options are checked, weights."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.hub import fetch
from ..checkpoint.modelcard import declared_task
from ..checkpoint.modules import MODULES
from ..checkpoint.spec import ModelSpec, Task, read_spec, with_own_head
from ..checkpoint.tensor_files import INDEX
from ..files import check_name


def read_configuration(
    checkpoint: str | Path,
    revision: str | None,
    task: Task | None,
    adapter: str | Path | None = None,
) -> ModelSpec:
    """Read a checkpoint's spec; arguments and errors as for `ModelSpec.from_checkpoint`.

    For a hub id, the weights are downloaded only if the configuration does not tell the task.
    """
    source = fetch(checkpoint, revision, weights=False, adapter=adapter)
    check_name(source.name)
    if task is None and not (
        (source.pipeline / MODULES).is_file()
        or (source.folder / INDEX).is_file()
        or declared_task(source.folder) is not None
    ):
        # Tensor names tell the task; without an index they are only in the weight file.
        fetch(source.id, source.revision)
    return read_spec(source, task)


def fetch_weights(spec: ModelSpec) -> ModelSpec:
    """Download a checkpoint's weights, at the commit that its spec was read from.

    Returns:
        The spec, with the head that the weights contain.

    Raises:
        CheckpointError: The download fails.
    """
    fetch(spec.source.id, spec.source.revision)
    return with_own_head(spec)
