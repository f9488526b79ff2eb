"""The artifact: a folder complete by itself, its manifest, and how it comes to be.

    my-model/
      embedport.json        the manifest below
      onnx/model.onnx       the graph, its weights in onnx/model.onnx_data
      tokenizer.json, tokenizer_config.json, config.json, modules.json, 1_Pooling/, …
      README.md             the model card

The folder is written beside its final place and renamed when it is complete and checked, so that
an interrupted or failed export leaves nothing that looks like an artifact.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .card import model_card
from .errors import ArtifactError, InputError
from .integrity import FileRecord, check_files, record_files
from .spec import Task

FORMAT_VERSION = 1
MANIFEST = "embedport.json"
CARD = "README.md"


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint an artifact was made from; `files` maps each shard to its sha256."""

    id: str
    revision: str | None
    files: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact.

    Attributes:
        task: "embedding" or "reranker".
        dialect: Of the graph: "ort" or "standard".
        precision: "fp32", "fp16" or "bf16".
        output: "pooled" (a vector or score a text) or "hidden" (a vector a token).
        graph: The graph's path in the folder.
        opset: Version of the graph's ONNX operators.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        kept_in_fp32: Parts that an fp16 graph keeps in fp32, because they would overflow.
        embedding_dim: Width of a vector; None for a reranker.
        hidden_size: Width of the model.
        vocab_size: Token ids are below this.
        max_length: Tokens after which a text is cut, by default.
        max_position_embeddings: Tokens of a text at most.
        prompts: Prompt name to the text put before an input; empty for a reranker.
        source: The checkpoint.
        requires: Runtime package and its lowest version.
        versions: Packages that made the artifact.
        files: Relative path to size and sha256, of every file but the manifest and the card.
        parity: Figures of the last validation, or None.
    """

    task: Task
    dialect: str
    precision: str
    output: str
    graph: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept_in_fp32: tuple[str, ...]
    embedding_dim: int | None
    hidden_size: int
    vocab_size: int
    max_length: int
    max_position_embeddings: int
    prompts: Mapping[str, str]
    source: SourceRecord
    requires: str
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The text of embedport.json."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Manifest:
        """Read embedport.json.

        Raises:
            ArtifactError: It is missing, damaged, lacks a key, has an unknown one, or has a newer
                format version.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing: {path.parent} is not an artifact; make one with "
                "`embedport export onnx`"
            ) from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} is not a manifest: {error!r}") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {version!r}, and this embedport reads up to "
                f"{FORMAT_VERSION}: upgrade embedport"
            )
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            odd = ", ".join(sorted(values.keys() ^ known))
            raise ArtifactError(f"{path}: missing or unknown keys: {odd}")
        try:
            for key in ("inputs", "outputs", "kept_in_fp32"):
                values[key] = tuple(values[key])
            values["source"] = SourceRecord(**values["source"])
            values["files"] = {name: FileRecord(**f) for name, f in values["files"].items()}
        except (TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error
        for name in (values["graph"], *values["files"]):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{path}: {name!r} is outside the artifact's folder")
        return cls(**values)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose files are what its manifest says."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Read and check an artifact.

        Raises:
            InputError: No such folder.
            ArtifactError: It is not an artifact, or a file is missing or changed.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        manifest = Manifest.from_json(folder / MANIFEST)
        check_files(folder, dict(manifest.files))
        return cls(folder, manifest)

    @property
    def graph(self) -> Path:
        """The graph's path."""
        return self.folder / self.manifest.graph

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
        InputError: `output` exists, its parent cannot be written, or the disk is too small.
    """
    output = output.expanduser().absolute()
    _check_output(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        free = shutil.disk_usage(output.parent).free
        if free < needs:
            raise InputError(
                f"{output.parent} has {free / 1e9:.2f} GB free, and the artifact needs "
                f"{needs / 1e9:.2f} GB"
            )
        partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{output.parent} cannot be written: {error}") from error
    try:
        yield partial
        _put_in_place(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{output.parent}: disk full while writing; the artifact needs "
                f"{needs / 1e9:.2f} GB. Nothing was left behind"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_output(output: Path, force: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise InputError(f"{output} exists; choose another place or replace it with --force")
    if output.is_dir() and not output.is_symlink() and (output / MANIFEST).is_file():
        return
    raise InputError(f"{output} is not an artifact, and is not replaced; choose another place")


def _remove_abandoned(output: Path) -> None:
    """Delete what exports of the same artifact that were killed have left."""
    for folder in output.parent.glob(f".{output.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _put_in_place(partial: Path, output: Path) -> None:
    if output.exists():
        old = partial.with_name(f"{partial.name}-old")
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Complete an artifact: hash its files, and write the manifest and the model card.

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
    _write(folder / CARD, model_card(manifest, folder.name))
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


def _write(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
