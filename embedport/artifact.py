"""The artifact: a folder complete by itself, its manifest, and how it comes to be.

    my-model/
      embedport.json        the manifest
      onnx/model.onnx       the graph, its weights in onnx/model.onnx_data; or model*.safetensors
      tokenizer.json, tokenizer_config.json, config.json, modules.json, 1_Pooling/, …
      README.md             the model card

The folder is written beside its final place and renamed when it is complete and checked, so that
an interrupted or failed export leaves nothing that looks like an artifact.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .card import model_card
from .errors import ArtifactError, InputError
from .files import MANIFEST, check_links
from .integrity import check_files, record_files
from .leftovers import OLD, lock, tidy_up
from .manifest import Manifest

CARD = "README.md"


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose files are what its manifest says."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Read and check an artifact.

        Raises:
            InputError: No such folder, or a link in it leads out of it.
            ArtifactError: It is not an artifact, or a file is missing or changed.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        manifest = Manifest.from_json(folder / MANIFEST)
        check_links(folder)
        check_files(folder, dict(manifest.files))
        return cls(folder, manifest)

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
        """Bytes of all files that the manifest lists."""
        return sum(record.size for record in self.manifest.files.values())


@contextlib.contextmanager
def staged(output: Path, *, force: bool, needs: int) -> Generator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    Args:
        output: The artifact's final place.
        force: Whether an artifact already there is replaced (another kind of folder never is).
        needs: Bytes that will be written, checked against the free space.

    Raises:
        InputError: `output` exists, its parent cannot be written, the disk is too small or gets
            full, or a file cannot be read or written on the way.
    """
    output = output.expanduser().absolute()
    check_place(output, force)
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < needs:
            raise InputError(
                f"{output.parent} has {free / 1e9:.2f} GB free, and the artifact needs "
                f"{needs / 1e9:.2f} GB"
            )
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{output.parent} cannot be written: {error}") from error
    held = None
    try:
        held = lock(partial)
        yield partial
        check_place(output, force)  # another export may have been quicker
        _put_in_place(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{output.parent}: disk full while writing; the artifact needs "
                f"{needs / 1e9:.2f} GB, and {output.name} was not written"
            ) from error
        raise InputError(f"{output} was not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


def check_place(output: Path, force: bool) -> None:
    """Refuse a place where something is, unless it is an artifact that may be replaced.

    What killed runs have left beside it is cleaned up first.

    Raises:
        InputError: It is.
    """
    tidy_up(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise InputError(f"{output} exists; choose another place or replace it with --force")
    if output.is_dir() and not output.is_symlink() and (output / MANIFEST).is_file():
        return
    raise InputError(f"{output} is not an artifact, and is not replaced; choose another place")


def _put_in_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = partial.with_name(f"{partial.name}{OLD}")
    # Held, so that no other run takes it for what a killed one has left.
    try:
        held = lock(output)
    except BlockingIOError:
        raise InputError(f"{output} is being replaced by another run: try it again") from None
    try:
        output.rename(old)
        try:
            partial.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if held is not None:
            os.close(held)


def write_manifest(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """Complete an artifact: hash its files, and write the manifest and the model card.

    Args:
        folder: Where it is being made.
        manifest: Its manifest.
        name: What the folder will be called.

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
    _write(folder / MANIFEST, manifest.to_json())
    _write(folder / CARD, model_card(manifest, name))
    return manifest


def record_parity(folder: str | Path, parity: Mapping[str, Any], table: str) -> None:
    """Put a validation's figures into an artifact's manifest and model card.

    Args:
        folder: The artifact's folder.
        parity: Figures that JSON can hold.
        table: The same for the model card, in Markdown.

    Raises:
        ArtifactError: It is not an artifact, or cannot be written.
    """
    folder = Path(folder).expanduser()
    manifest = replace(Manifest.from_json(folder / MANIFEST), parity=dict(parity))
    try:
        _write(folder / CARD, model_card(manifest, folder.resolve().name, table))
        _write(folder / MANIFEST, manifest.to_json())
    except OSError as error:
        raise ArtifactError(f"{folder}: the figures cannot be recorded: {error}") from error


def record_ranges(folder: str | Path, ranges: Mapping[str, Any]) -> None:
    """Put the ranges of an embedder's values into its manifest.

    Args:
        folder: The artifact's folder.
        ranges: Width to the smallest and largest of each value.

    Raises:
        ArtifactError: It is not an artifact, or cannot be written.
    """
    path = Path(folder).expanduser() / MANIFEST
    manifest = replace(Manifest.from_json(path), ranges=dict(ranges))
    try:
        _write(path, manifest.to_json())
    except OSError as error:
        raise ArtifactError(f"{path}: the ranges cannot be recorded: {error}") from error


def _write(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
