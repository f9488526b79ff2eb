"""The artifact: a self-contained folder with a manifest; how it is opened and written.

    my-model/
      embedport.json        the manifest
      onnx/model.onnx       the graph, its weights in onnx/model.onnx_data; or model*.safetensors
      tokenizer.json, tokenizer_config.json, config.json, modules.json, 1_Pooling/, …
      README.md             the model card

The folder is written beside its final place and renamed once it is complete and checked, so an
interrupted or failed export leaves nothing that looks like an artifact.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError
from ..files import MANIFEST, check_name, written
from ..integrity import State, check_files, check_unchanged, read_states, record_files
from ..leftovers import OLD, lock, tidy_up
from ..links import check_links
from ..tables import size_words
from .card import model_card
from .manifest import Manifest

CARD = "README.md"
# Files that change what a tokenizer gives, if they are there.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose files match its manifest.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        states: The states of its files, from before they were compared with the manifest.
    """

    folder: Path
    manifest: Manifest
    states: Mapping[Path, State] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        # A manifest is too long for a notebook.
        about = f"task={self.manifest.task!r}, precision={self.manifest.precision!r}"
        return f"Artifact({str(self.folder)!r}, {about})"

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Read and check an artifact.

        Raises:
            InputError: There is no such folder, or a link leads out of it.
            ArtifactError: It is not an artifact, or a file is missing or changed.

        >>> Artifact.open(embedder).manifest.precision
        'fp32'
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        manifest = Manifest.from_json(folder / MANIFEST)
        check_links(folder)
        states = read_states(folder / name for name in manifest.files)
        check_files(folder, dict(manifest.files))
        for name in TOKENIZER_FILES:
            if name not in manifest.files and (folder / name).exists():
                raise ArtifactError(
                    f"{folder / name} was added to the artifact, and would change its tokens: take "
                    "it out"
                )
        return cls(folder, manifest, states)

    def check_unchanged(self) -> None:
        """Refuse what was read from files that were replaced since the artifact was opened.

        Raises:
            ArtifactError: A file has another state.
        """
        check_unchanged(self.states, ArtifactError)

    @property
    def graph(self) -> Path:
        """The graph's path.

        Raises:
            ArtifactError: The artifact is a checkpoint.
        """
        if self.manifest.graph is None:
            raise ArtifactError(f"{self.folder} is a checkpoint and has no ONNX graph")
        return self.folder / self.manifest.graph.path

    @property
    def size(self) -> int:
        """Total bytes of the files that the manifest lists."""
        return sum(record.size for record in self.manifest.files.values())


@contextlib.contextmanager
def staged(output: Path, *, force: bool, needs: int) -> Generator[Path]:
    """Yield a temporary folder that is renamed to `output` if the block ends without an error.

    Args:
        output: The artifact's final place.
        force: Whether to replace an existing artifact (another kind of folder is never replaced).
        needs: Bytes that will be written, checked against the free space.

    Raises:
        InputError: `output` exists, its parent cannot be written, the disk has too little space or
            fills up, or a file cannot be read or written in the block.
    """
    output = output.expanduser().absolute()
    check_place(output, force)
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < needs:
            raise InputError(
                f"{output.parent} has {size_words(free)} free, and the artifact needs "
                f"{size_words(needs)}"
            )
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{output.parent} cannot be written: {error}") from error
    descriptor = None
    try:
        descriptor = lock(partial)
        yield partial
        check_place(output, force)  # another export may have finished first
        _put_in_place(partial, output)
    except BaseException as error:
        # Windows deletes no file that is mapped: what failed may still hold a session of the graph.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{output.parent}: disk full while writing; the artifact needs "
                f"{size_words(needs)}, and {output.name} was not written"
            ) from error
        raise InputError(f"{output} was not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_place(output: Path, force: bool) -> None:
    """Refuse a path that exists, unless it is an artifact and `force` allows replacing it.

    Leftovers of killed runs beside it are cleaned up first.

    Raises:
        InputError: The path must not be written.
    """
    check_name(output)
    tidy_up(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise InputError(f"{output} exists; choose another place or replace it with `force`")
    if output.is_dir() and not output.is_symlink() and (output / MANIFEST).is_file():
        return
    raise InputError(f"{output} is not an artifact, and is not replaced; choose another place")


def _put_in_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = partial.with_name(f"{partial.name}{OLD}")
    # Locked, so that no other run takes it for a killed run's leftover.
    try:
        descriptor = lock(output)
    except BlockingIOError:
        raise InputError(f"{output} is being replaced by another run: try it again") from None
    try:
        try:
            output.rename(old)
            partial.rename(output)
        except BaseException:  # Ctrl-C, too
            if old.exists() and not os.path.lexists(output):
                old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_manifest(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """Complete an artifact: hash its files, and write the manifest and the model card.

    Args:
        folder: The folder in which the artifact is being written.
        manifest: Its manifest.
        name: The folder's final name.

    Returns:
        The manifest with `files` filled in.
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in (folder / MANIFEST, folder / CARD)
    ]
    records = record_files(paths)
    files = {path.relative_to(folder).as_posix(): records[path] for path in paths}
    manifest = replace(manifest, files=files)
    (folder / MANIFEST).write_bytes(manifest.to_json().encode())
    (folder / CARD).write_bytes(model_card(manifest, name).encode())
    return manifest


def record_parity(artifact: Artifact, parity: Mapping[str, Any], table: str) -> None:
    """Store a validation's figures in an artifact's manifest and model card.

    Args:
        artifact: The artifact that was validated.
        parity: The figures, as JSON values.
        table: The same in Markdown, for the model card.

    Raises:
        ArtifactError: The folder holds another artifact by now, or cannot be written.
    """
    folder = artifact.folder
    with _present_manifest(artifact, "figures") as manifest:
        manifest = replace(manifest, parity=dict(parity))
        _record(folder / CARD, model_card(manifest, folder.resolve().name, table), "figures")
        _record(folder / MANIFEST, manifest.to_json(), "figures")


def record_ranges(artifact: Artifact, ranges: Mapping[str, Any]) -> None:
    """Store the value ranges of an embedder's vectors in its manifest.

    Args:
        artifact: The artifact whose vectors were measured.
        ranges: Vector width to the minimum and maximum of each value.

    Raises:
        ArtifactError: The folder holds another artifact by now, or cannot be written.
    """
    with _present_manifest(artifact, "ranges") as manifest:
        text = replace(manifest, ranges=dict(ranges)).to_json()
        _record(artifact.folder / MANIFEST, text, "ranges")


@contextlib.contextmanager
def _present_manifest(artifact: Artifact, what: str) -> Generator[Manifest]:
    """The manifest to record something in; no other run records or replaces it in the block.

    Raises:
        ArtifactError: The folder holds another artifact by now, or none.
    """
    try:
        descriptor = lock(artifact.folder, wait=True)
    except OSError as error:
        raise ArtifactError(f"the {what} cannot be recorded: {error}") from error
    try:
        manifest = Manifest.from_json(artifact.folder / MANIFEST)
        measured = replace(artifact.manifest, parity=manifest.parity, ranges=manifest.ranges)
        if manifest != measured:
            raise ArtifactError(
                f"the {what} are not recorded: {artifact.folder} was replaced while they were "
                "measured, and they are its predecessor's; measure again"
            )
        yield manifest
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _record(path: Path, text: str, what: str) -> None:
    """Replace a small file atomically: a reader sees the old text or the new one."""
    try:
        with written(path) as file:
            file.write(text.encode())
    except InputError as error:
        raise ArtifactError(f"the {what} cannot be recorded: {error}") from error
