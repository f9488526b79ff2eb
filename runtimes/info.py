"""The info about a model that every runtime needs, from an artifact or from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artifact.folder import Artifact
from ..artifact.manifest import Manifest
from ..checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from ..checkpoint.chat import FURTHER as TEMPLATES
from ..checkpoint.hub import Source, fetch
from ..checkpoint.modules import MODULES
from ..checkpoint.pipeline import Inputs, Outputs
from ..checkpoint.pooling import DENSE_FILE
from ..checkpoint.spec import ModelSpec, Task, read_spec
from ..checkpoint.tensor_files import read_headers
from ..checkpoint.weights import Weights
from ..checks import check_integer
from ..errors import ArtifactError, InputError
from ..files import MANIFEST
from ..integrity import record_files
from ..links import check_links

CONFIG = "config.json"
# safetensors' floating-point dtypes to the names of precisions.
FLOATS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


class Model(Protocol):
    """A model on its device.

    Attributes:
        device: "cpu", "cuda" or "tensorrt".
        precision: The storage format and the arithmetic, in words.
    """

    device: str
    precision: str

    def __call__(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, prompt_length: int = 0
    ) -> np.ndarray:
        """Run a batch.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 at real tokens; padding on either side.
            prompt_length: Number of leading tokens to leave out of pooling, for a model that does
                not pool its prompts.

        Returns:
            float32: embeddings [batch, dim], or scores [batch].
        """
        ...


@dataclass(frozen=True)
class ModelInfo:
    """A model's description.

    Attributes:
        name: The folder or hub id it was opened by.
        task: "embedding" or "reranker".
        precision: As in a manifest; for an unquantized checkpoint, the name of its stored dtype.
        dim: Width of a vector; for a reranker, the model's hidden size.
        hidden_size: Width of the model.
        vocab_size: Rows of the embedding table; token ids are below this.
        max_length: Default maximum tokens of a text; longer ones are cut.
        max_position_embeddings: The model's number of positions: the largest possible max_length.
        inputs: How inputs become tokens.
        outputs: How the last layer's hidden states become vectors or scores.
        ranges: Each value's range by width, for 8-bit vectors; None if not measured.
        source: Id of the checkpoint it was exported from; for a checkpoint, its own id.
        is_cached: Whether its folder is in the hub's cache, which is never written to.
        folder: Where its files are; for a checkpoint, the folder of the files beside the weights.
        artifact: The artifact; None for a checkpoint without a manifest.
        checkpoint: The checkpoint that torch runs; None if the model is a graph.
    """

    name: str
    task: Task
    precision: str
    dim: int
    hidden_size: int
    vocab_size: int
    max_length: int
    max_position_embeddings: int
    inputs: Inputs
    outputs: Outputs
    ranges: Mapping[str, Any] | None
    source: str
    is_cached: bool
    folder: Path
    artifact: Artifact | None
    checkpoint: ModelSpec | None

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text put before an input."""
        return self.inputs.prompts

    def check_unchanged(self) -> None:
        """Refuse what was read from files that were replaced since this description was read.

        Raises:
            ArtifactError: A file of the artifact was replaced.
            CheckpointError: A file of the checkpoint was replaced.
        """
        if self.artifact is not None:
            self.artifact.check_unchanged()
        if self.checkpoint is not None:
            self.checkpoint.source.check_unchanged()


def read_info(
    model: str | Path, task: Task | None = None, adapter: str | Path | None = None
) -> ModelInfo:
    """Read a model's description: an artifact's, or that of a checkpoint in the hub's layout.

    Args:
        model: A folder, or a hub id.
        task: "embedding" or "reranker", needed if a checkpoint's files do not say which.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.

    Raises:
        InputError: There is no such folder or hub id; it is neither an artifact nor a checkpoint;
            or its files contradict `task`, or name no task and `task` is None.
        ArtifactError: A file of the artifact is missing or changed.
        CheckpointError: It is not a Qwen3 checkpoint, or needs a feature that is not supported.
    """
    source = fetch(model, adapter=adapter)
    if (source.folder / MANIFEST).is_file():
        return _artifact_info(source, Artifact.open(source.folder), task)
    if not any((source.folder / name).is_file() for name in (CONFIG, MODULES)):
        raise InputError(
            f"{source.folder} is neither an artifact nor a checkpoint: it has no {MANIFEST} and no "
            f"{CONFIG}"
        )
    return _checkpoint_info(source, task)


def _artifact_info(source: Source, artifact: Artifact, task: Task | None) -> ModelInfo:
    manifest = artifact.manifest
    if task not in (None, manifest.task):
        raise InputError(
            f"{artifact.folder}: task is {task!r}, and its manifest says {manifest.task!r}"
        )
    checkpoint = None
    if manifest.format == "checkpoint":
        checkpoint = read_spec(source, manifest.task)
        if manifest.task == "embedding" and manifest.embedding_dim != checkpoint.embedding_dim:
            raise ArtifactError(
                f"{artifact.folder / MANIFEST}: embedding_dim should be "
                f"{checkpoint.embedding_dim}, as the checkpoint's files say; found "
                f"{manifest.embedding_dim}: the manifest was changed; quantize it again"
            )
    return ModelInfo(
        name=source.id,
        task=manifest.task,
        precision=manifest.precision,
        dim=manifest.embedding_dim or manifest.hidden_size,
        hidden_size=manifest.hidden_size,
        vocab_size=manifest.vocab_size,
        max_length=_longest(manifest),
        max_position_embeddings=manifest.max_position_embeddings,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        ranges=manifest.ranges,
        source=manifest.source.id,
        is_cached=source.is_cached,
        folder=artifact.folder,
        artifact=artifact,
        checkpoint=checkpoint,
    )


def _longest(manifest: Manifest) -> int:
    """The default max_length; an engine takes no more tokens than its largest profile."""
    if manifest.engine is None:
        return manifest.max_length
    return min(manifest.max_length, max(profile.max[1] for profile in manifest.engine.profiles))


def _checkpoint_info(source: Source, task: Task | None) -> ModelInfo:
    check_links(source.folder)
    if source.adapter is not None:
        check_links(source.adapter.folder)
    spec = read_spec(source, task)
    return ModelInfo(
        name=source.name,
        task=spec.task,
        precision=_name_precision(spec),
        dim=spec.embedding_dim if spec.task == "embedding" else spec.hidden_size,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_length=spec.max_length,
        max_position_embeddings=spec.max_position_embeddings,
        inputs=spec.inputs,
        outputs=spec.outputs,
        ranges=None,
        source=source.name,
        is_cached=source.is_cached,
        folder=source.pipeline,
        artifact=None,
        checkpoint=spec,
    )


def _name_precision(spec: ModelSpec) -> str:
    return stored_float(spec) if spec.quantization is None else spec.quantization.precision


def stored_float(spec: ModelSpec) -> str:
    """The stored dtype of unquantized tensors, "fp16", "bf16" or "fp32": the embedding table's.

    Raises:
        CheckpointError: The table is missing, or has another dtype.
    """
    name = "embed_tokens.weight"
    return FLOATS[Weights(spec, [name]).tensors[name].dtype]


def hash_model(info: ModelInfo) -> str:
    """One sha256 over all files that determine a model's results."""
    if info.artifact is not None:
        files = sorted(info.artifact.manifest.files.items())
        return hash_json({name: record.sha256 for name, record in files})
    assert info.checkpoint is not None
    return hash_json(hash_files(info.checkpoint))


def hash_files(spec: ModelSpec) -> list[tuple[str, str]]:
    """(name, sha256) of all files that determine a checkpoint's results, sorted."""
    source = spec.source
    paths = {info.file for info in read_headers(source.folder).values()}
    paths |= {source.pipeline / dense.path / DENSE_FILE for dense in spec.outputs.dense}
    folders = [source.folder]
    if source.adapter is not None:
        folders.append(source.adapter.folder)
        paths.add(source.adapter.folder / ADAPTER_WEIGHTS)
    for folder in folders:
        for pattern in ("*.json", "*.jinja", f"{TEMPLATES}/*.jinja", "*/config.json"):
            paths.update(folder.glob(pattern))
    # Regular files only: reading a pipe or a device would never end.
    regular = [path for path in paths if path.name != MANIFEST and path.is_file()]

    def name(path: Path) -> str:
        # Two Dense modules have files of the same names.
        number = next(i for i, folder in enumerate(folders) if path.is_relative_to(folder))
        return f"{number}/{path.relative_to(folders[number]).as_posix()}"

    return sorted((name(path), record.sha256) for path, record in record_files(regular).items())


def hash_json(value: object) -> str:
    """The sha256 of a value's JSON text."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def choose_length(info: ModelInfo, max_length: int | None) -> int:
    """Choose how many tokens a text may have: `max_length`, or the model's own limit if None.

    Raises:
        InputError: `max_length` is no integer, or exceeds the model's positions.
    """
    if max_length is None:
        return info.max_length
    check_integer("max_length", max_length)
    if not 1 <= max_length <= info.max_position_embeddings:
        raise InputError(
            f"max_length should be from 1 to {info.max_position_embeddings}, found {max_length}"
        )
    return int(max_length)
