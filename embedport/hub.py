"""Where a model's files are: a local folder, or a Hugging Face hub id in the local cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, InputError
from .files import MANIFEST, check_broken_links, read_json
from .leftovers import tidy_up

# A checkpoint is its configuration, tokenizer, model card and safetensors. Nothing else is fetched:
# no pickled weights, no code.
CONFIG_PATTERNS = ["*.json", "*.jinja", "merges.txt", "*/config.json", "README.md"]
WEIGHT_PATTERNS = ["*.safetensors"]
# A commit's folder in huggingface_hub's cache.
SNAPSHOT = "models--*/snapshots/*"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint's origin: `id` as the user gave it, `revision` a commit hash if from the hub."""

    id: str
    revision: str | None
    folder: Path

    @property
    def is_cached(self) -> bool:
        """Whether the folder is the hub's cache, which is not written to, whoever named it."""
        return self.revision is not None or self.folder.resolve().match(SNAPSHOT)


def fetch(checkpoint: str | Path, revision: str | None = None, *, weights: bool = True) -> Source:
    """Find a model's folder, downloading it through huggingface_hub when it is a hub id.

    A checkpoint's weights and configuration are downloaded; of an artifact all that its manifest
    lists.

    The hub's cache, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured.

    Args:
        checkpoint: A folder of a checkpoint or an artifact, or a hub id such as
            "Qwen/Qwen3-Embedding-0.6B", perhaps with a revision: "Qwen/Qwen3-Embedding-0.6B@main".
        revision: A branch, tag or commit of the hub repository.
        weights: Whether a checkpoint's safetensors are needed too, or its configuration only.

    Raises:
        InputError: The folder does not exist or has a link that leads nowhere, or a revision is
            given for a folder, or two.
        CheckpointError: The hub does not have it, or cannot be reached and the cache lacks it.
    """
    folder = Path(checkpoint).expanduser()
    tidy_up(folder)
    try:
        is_folder, is_there = folder.is_dir(), os.path.lexists(folder)
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        reason = getattr(error, "strerror", error)
        raise InputError(f"{str(checkpoint)[:200]!r} cannot be a folder: {reason}") from error
    if is_folder and not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{checkpoint} cannot be read: permission denied")
    if is_folder:
        if revision is not None:
            raise InputError(
                f"{checkpoint} is a local folder and has no revision {revision!r}; "
                "leave the revision out"
            )
        check_broken_links(folder, CONFIG_PATTERNS + WEIGHT_PATTERNS)
        return Source(str(checkpoint), None, folder)
    if is_there:
        raise InputError(f"{checkpoint} is no folder; give the checkpoint's folder")
    name, _, at = str(checkpoint).partition("@")
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{checkpoint}: no such folder, and not a hub id of the form owner/name")
    if at and revision not in (None, at):
        raise InputError(f"{checkpoint} names revision {at}, and {revision} is given: give one")
    return _download(name, at or revision, weights)


def _download(repo_id: str, revision: str | None, weights: bool) -> Source:
    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    folder = _snapshot(repo_id, revision, patterns)
    if (folder / MANIFEST).is_file():  # an artifact, which is all that its manifest lists
        files = read_json(folder / MANIFEST).get("files") or {}
        folder = _snapshot(repo_id, folder.name, [*CONFIG_PATTERNS, *files])
    return Source(repo_id, folder.name, folder)


def _snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise InputError(f"{repo_id}: no such folder, and not a hub id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{repo_id} is gated: log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: no such folder here and no such repository on the hub "
            "(or it is private: log in with `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(
            f"{repo_id}{at}: no such folder here, not whole in the hub's cache, and the hub cannot "
            f"be reached (HF_HUB_OFFLINE, or no network?): {cause}"
        ) from error
    except Exception as error:  # of the network's libraries, each with classes of its own
        raise CheckpointError(
            f"{repo_id}{at} could not be downloaded: {type(error).__name__}: {error}"
        ) from error
