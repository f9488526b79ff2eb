"""The folder that takes a validation's figures, chosen before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..checkpoint.hub import fetch
from ..errors import ArtifactError
from ..files import MANIFEST

logger = logging.getLogger(__name__)


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
