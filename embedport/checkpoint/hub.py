"""Finds a model's files: a local folder, or a Hugging Face hub id downloaded to the cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..files import MANIFEST
from ..integrity import State, check_unchanged, read_states
from ..leftovers import tidy_up
from ..links import check_broken_links
from ..strict_json import read_json
from .adapter import CONFIG as ADAPTER_CONFIG
from .adapter import is_adapter, read_base

CARD = "README.md"
# A checkpoint's configuration, tokenizer, model card and safetensors. Nothing else is downloaded:
# no pickled weights, no code.
CONFIG_PATTERNS = ["*.json", "*.jinja", "merges.txt", "*/config.json", CARD]
CONFIG_PATTERNS += [f"*/{ADAPTER_CONFIG}"]
# An adapter's folder with one of these files also provides the tokenizer and the pipeline.
PIPELINE = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
WEIGHT_PATTERNS = ["*.safetensors"]
# A commit's folder in huggingface_hub's cache.
SNAPSHOT = "models--*/snapshots/*"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint's origin.

    Attributes:
        id: Hub id or folder, as the user gave it.
        revision: Commit hash if it is from the hub.
        folder: The folder with config.json and the weights, absolute: a program may change its own.
        adapter: The adapter to merge into the weights.
        states: The states that a local folder's files had before any was read.
    """

    id: str
    revision: str | None
    folder: Path
    adapter: Source | None = None
    states: Mapping[Path, State] = field(default_factory=dict, compare=False, repr=False)

    @property
    def pipeline(self) -> Path:
        """The folder with the tokenizer and sentence-transformers' files.

        The adapter's folder if it has sentence-transformers' files, because sentence-transformers
        then opens that folder; otherwise the base's.
        """
        if self.adapter is None:
            return self.folder
        has_pipeline = any((self.adapter.folder / name).exists() for name in PIPELINE)
        return self.adapter.folder if has_pipeline else self.folder

    @property
    def name(self) -> str:
        """The id, with the adapter's id if there is one."""
        return self.id if self.adapter is None else f"{self.id} with {self.adapter.id}"

    @property
    def pinned(self) -> str:
        """Id and revision in the form that `fetch` accepts, without the adapter."""
        return pin(self.id, self.revision)

    @property
    def is_local(self) -> bool:
        """Whether it was given as a folder, so that nothing is downloaded."""
        return self.revision is None

    @property
    def is_cached(self) -> bool:
        """Whether the folder is in the hub's cache, which must not be written to."""
        return self.revision is not None or self.folder.resolve().match(SNAPSHOT)

    def check_unchanged(self) -> None:
        """Refuse what was read from a folder whose files were replaced since it was found.

        Raises:
            CheckpointError: A file has another state.
        """
        check_unchanged(self.states, CheckpointError)
        if self.adapter is not None:
            self.adapter.check_unchanged()


def fetch(
    checkpoint: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    adapter: str | Path | None = None,
) -> Source:
    """Find a model's folder; a hub id is downloaded through huggingface_hub.

    For an adapter, the base named in its adapter_config.json is found, too. A checkpoint's weights
    and configuration are downloaded, and an artifact's files that its manifest lists.

    The hub's cache, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured.

    Args:
        checkpoint: A folder of a checkpoint or an artifact, or a hub id such as
            "Qwen/Qwen3-Embedding-0.6B", perhaps with a revision: "Qwen/Qwen3-Embedding-0.6B@main".
        revision: A branch, tag or commit of the hub repository.
        weights: Whether to download a checkpoint's safetensors, too. An adapter's always are.
        adapter: The folder or hub id of an adapter to merge into the checkpoint, perhaps with a
            revision.

    Raises:
        InputError: The folder does not exist or has a broken link; a revision is given for a
            folder, or two revisions; or an adapter is given for an adapter or an artifact.
        CheckpointError: The hub does not have it, or cannot be reached and the cache lacks it.
    """
    source = _find(checkpoint, revision, weights)
    if adapter is not None:
        if is_adapter(source.folder) or (source.folder / MANIFEST).is_file():
            kind = "an adapter itself" if is_adapter(source.folder) else "an artifact"
            raise InputError(
                f"{checkpoint} is {kind}: give `adapter` with the checkpoint that the adapter was "
                "trained on"
            )
        adapter_source = _find(adapter, None, weights=True)
        if not (adapter_source.folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG}")
        return replace(source, adapter=adapter_source)
    return _with_base(source, weights) if is_adapter(source.folder) else source


def pin(name: str, revision: str | None) -> str:
    """A folder or hub id and its revision in one string, as `fetch` accepts them."""
    return f"{name}@{revision}" if revision else name


def _with_base(adapter: Source, weights: bool) -> Source:
    """The source of an adapter's base, with the adapter."""
    base, revision = read_base(adapter.folder)
    try:
        with contextlib.suppress(OSError, ValueError):  # _find reports these
            # PEFT stores a revision for a folder, too, where it means nothing.
            revision = None if Path(base).is_dir() else revision
        source = _find(base, revision, weights)
        if is_adapter(source.folder):
            raise InputError(f"{base} is an adapter too")
    except (InputError, CheckpointError) as error:
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG}: the base, {base!r}, cannot be used: {error}; "
            f"give the base, and {adapter.id} as `adapter`"
        ) from error
    if not weights:
        adapter = _find(adapter.id, adapter.revision, weights=True)
    return replace(source, adapter=adapter)


def _find(checkpoint: str | Path, revision: str | None, weights: bool) -> Source:
    """The source of a folder or hub id, without its base or adapter."""
    try:
        folder = Path(checkpoint).expanduser()
    except RuntimeError as error:
        raise InputError(f"{str(checkpoint)[:200]!r} cannot be a folder: {error}") from error
    tidy_up(folder)
    try:
        is_folder, exists = folder.is_dir(), os.path.lexists(folder)
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
        folder = folder.absolute()
        return Source(str(checkpoint), None, folder, states=_read_states(folder))
    if exists:
        raise InputError(f"{checkpoint} is a file; give an artifact's or checkpoint's folder")
    name, _, named_revision = str(checkpoint).partition("@")
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{checkpoint}: no such folder, and not a hub id of the form owner/name")
    if named_revision and revision not in (None, named_revision):
        raise InputError(
            f"{checkpoint} names revision {named_revision}, and {revision} is given: give one"
        )
    return _download(name, named_revision or revision, weights)


def _read_states(folder: Path) -> dict[Path, State]:
    paths = {path for pattern in CONFIG_PATTERNS + WEIGHT_PATTERNS for path in folder.glob(pattern)}
    # Figures may be recorded in these while another process reads the folder.
    return read_states(path for path in paths if path.name not in (MANIFEST, CARD))


def _download(repo_id: str, revision: str | None, weights: bool) -> Source:
    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    folder = _snapshot(repo_id, revision, patterns)
    if (folder / MANIFEST).is_file():  # an artifact: download all that its manifest lists
        files = read_json(folder / MANIFEST).get("files")
        files = files if isinstance(files, dict) else {}  # else opening it reports the damage
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
        found = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        return Path(found).absolute()
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
            f"{repo_id}{at}: no such folder here, not complete in the hub's cache, and the hub "
            f"cannot be reached (HF_HUB_OFFLINE, or no network?): {cause}"
        ) from error
    except Exception as error:  # network libraries raise their own classes
        raise CheckpointError(
            f"{repo_id}{at} could not be downloaded: {type(error).__name__}: {error}"
        ) from error
