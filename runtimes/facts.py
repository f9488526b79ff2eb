"""What the runtimes need to know of a model, wherever it comes from, and what runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..artifact import Artifact
from ..errors import InputError
from ..files import MANIFEST, check_links
from ..hub import Source, fetch
from ..manifest import Manifest
from ..pipeline import Inputs, Outputs
from ..spec import ModelSpec, Task, read_spec
from ..weights import Weights

CONFIG = "config.json"
# safetensors' floating-point dtypes to the names of precisions.
FLOATS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


class Model(Protocol):
    """A model on its device.

    Attributes:
        device: "cpu", "cuda" or "tensorrt".
        precision: What is stored and what is computed in, in words.
    """

    device: str
    precision: str

    def __call__(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, prompt_length: int = 0
    ) -> np.ndarray:
        """Run a batch.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 at real tokens, padding on either side.
            prompt_length: Tokens at each text's beginning that are not pooled, where the model
                leaves its prompts out.

        Returns:
            float32: embeddings [batch, dim], or scores [batch].
        """
        ...


@dataclass(frozen=True)
class ModelFacts:
    """What a model is.

    Attributes:
        name: The folder or hub id it was opened by.
        task: "embedding" or "reranker".
        precision: As in a manifest; of a checkpoint that is not quantized, the stored dtype's.
        dim: Width of a vector; a reranker has none, and this is the model's width.
        hidden_size: Width of the model.
        vocab_size: Token ids are below this.
        max_length: Tokens after which a text is cut, by default.
        max_position_embeddings: Tokens of a text at most.
        inputs: How inputs become tokens.
        outputs: What is made of the last layer's states.
        ranges: Each value's range by width, for vectors in 8 bits, if they were measured.
        source: The id of the checkpoint that it was made from; its own if it is one.
        is_cached: Whether its folder is the hub's cache, which is not written to.
        folder: Where its files are; of a checkpoint, those beside its weights.
        artifact: The artifact; None for a checkpoint without a manifest.
        checkpoint: What torch runs; None where it is a graph.
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


def read_facts(
    model: str | Path, task: Task | None = None, adapter: str | Path | None = None
) -> ModelFacts:
    """Find out what a model is: an artifact, or a checkpoint in the hub's layout.

    Args:
        model: A folder, or a hub id.
        task: "embedding" or "reranker", for a checkpoint whose files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.

    Raises:
        InputError: No such folder or hub id, or it is neither, or its files say another task, or
            none and none is given.
        ArtifactError: A file of the artifact is missing or changed.
        CheckpointError: It is not a Qwen3 checkpoint, or needs what is not read.
    """
    source = fetch(model, adapter=adapter)
    if (source.folder / MANIFEST).is_file():
        return _artifact_facts(source, Artifact.open(source.folder), task)
    if not (source.folder / CONFIG).is_file():
        raise InputError(
            f"{source.folder} is neither an artifact nor a checkpoint: it has no {MANIFEST} and no "
            f"{CONFIG}"
        )
    return _checkpoint_facts(source, task)


def _artifact_facts(source: Source, artifact: Artifact, task: Task | None) -> ModelFacts:
    manifest = artifact.manifest
    if task not in (None, manifest.task):
        raise InputError(
            f"{artifact.folder}: task is {task!r}, and its manifest says {manifest.task!r}"
        )
    checkpoint = None
    if manifest.format == "checkpoint":
        checkpoint = read_spec(source, manifest.task)
    return ModelFacts(
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
    """Tokens after which a text is cut; an engine takes no more than its largest profile."""
    if manifest.engine is None:
        return manifest.max_length
    return min(manifest.max_length, max(each.max[1] for each in manifest.engine.profiles))


def _checkpoint_facts(source: Source, task: Task | None) -> ModelFacts:
    check_links(source.folder)
    if source.adapter is not None:
        check_links(source.adapter.folder)
    spec = read_spec(source, task)
    return ModelFacts(
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
    """The dtype of what is not quantized, "fp16", "bf16" or "fp32": the embedding table's.

    Raises:
        CheckpointError: The table is missing, or of another dtype.
    """
    name = "embed_tokens.weight"
    return FLOATS[Weights(spec, [name]).tensors[name].dtype]


def choose_length(facts: ModelFacts, max_length: int | None) -> int:
    """Tokens after which a text is cut: the caller's choice, or the model's own.

    Raises:
        InputError: It is beyond the model's positions.
    """
    if max_length is None:
        return facts.max_length
    if not 1 <= max_length <= facts.max_position_embeddings:
        raise InputError(
            f"max_length should be from 1 to {facts.max_position_embeddings}, found {max_length}"
        )
    return max_length
