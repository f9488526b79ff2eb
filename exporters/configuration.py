"""A checkpoint in two steps: its configuration, and its weights once nothing else can be wrong."""

from __future__ import annotations

from pathlib import Path

from ..files import INDEX
from ..hub import fetch
from ..modelcard import declared_task
from ..spec import ModelSpec, Task, read_spec, with_own_head


def read_configuration(
    checkpoint: str | Path,
    revision: str | None,
    task: Task | None,
    adapter: str | Path | None = None,
) -> ModelSpec:
    """The spec of a checkpoint; arguments and errors as for `ModelSpec.from_checkpoint`.

    Of a hub id the configuration alone is downloaded where that tells the task, else the weights
    too.
    """
    source = fetch(checkpoint, revision, weights=False, adapter=adapter)
    tells = (source.pipeline / "modules.json").is_file() or (source.folder / INDEX).is_file()
    tells = tells or declared_task(source.folder) is not None
    if task is None and not tells:
        # The names of its tensors tell, and they are in the one file of its weights.
        fetch(source.id, source.revision)
    return read_spec(source, task)


def fetch_weights(spec: ModelSpec) -> ModelSpec:
    """Download the weights of a checkpoint, of the very commit that its spec was read from.

    Returns:
        The spec, with the head that the weights turn out to have.

    Raises:
        CheckpointError: The hub does not give them.
    """
    fetch(spec.source.id, spec.source.revision)
    return with_own_head(spec)
