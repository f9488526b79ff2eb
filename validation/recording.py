"""Where a validation's figures go, decided before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..errors import ArtifactError
from ..files import MANIFEST
from ..hub import fetch

logger = logging.getLogger(__name__)


def find_recorded(artifact: str | Path) -> Path | None:
    """The folder whose manifest and model card take the figures of a validation.

    Args:
        artifact: An artifact or a checkpoint, as for `validate`.

    Returns:
        None for a checkpoint without a manifest, and for what is in the hub's cache, which is what
        somebody published: a warning says so.

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
            "%s is in the hub's cache, where no figures are recorded: validate a copy of the "
            "folder for that",
            artifact,
        )
        return None
    if not os.access(source.folder, os.W_OK):
        raise ArtifactError(
            f"{source.folder} is read-only, and should take the figures; make it writable, or "
            "validate with --no-record"
        )
    return source.folder
