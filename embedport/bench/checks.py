"""Checks before a benchmark, made before anything is installed or prepared."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.hub import fetch
from ..checkpoint.spec import ModelSpec, read_spec
from ..checkpoint.weights import Weights
from ..errors import InputError
from ..runtimes.info import ModelInfo
from ..tables import size_words
from .runners import PEERS, Peer, with_sources
from .workloads import Workload


def check_request(
    artifacts: Sequence[str | Path],
    peers: Sequence[str],
    checkpoint: str | Path | None,
    rounds: int,
) -> None:
    """Check that options go together and that peers can be installed.

    Raises:
        InputError: No artifact, no round, an unknown peer, one peer twice, peers without a
            checkpoint or the other way round, or peers without uv.
    """
    if not artifacts:
        raise InputError("a benchmark needs at least one artifact")
    if rounds < 1:
        raise InputError(f"rounds should be at least 1, found {rounds}")
    if unknown := [name for name in peers if name not in PEERS]:
        raise InputError(f"no peer is named {unknown[0]!r}; there are {', '.join(PEERS)}")
    if twice := [name for name, count in Counter(peers).items() if count > 1]:
        raise InputError(f"peer {twice[0]} is given twice")
    if checkpoint is not None and not peers:
        raise InputError("`checkpoint` is for peers, and none is given: give `peers`")
    if not peers:
        return
    if checkpoint is None:
        raise InputError(
            "peers serve a checkpoint: give `checkpoint`, ideally the one that the artifact was "
            "made from"
        )
    if shutil.which("uv") is None:
        raise InputError(
            "peers run in environments of their own, which uv creates, and uv is not installed: "
            "pip install uv, or leave `peers` out"
        )


def check_models(models: Sequence[ModelInfo]) -> None:
    """Check that the models' results can be compared.

    Raises:
        InputError: The models have different tasks, or vectors of different widths.
    """
    first = models[0]
    for model in models[1:]:
        if model.task != first.task:
            raise InputError(
                f"{model.name} has another task ({model.task}) than {first.name} ({first.task}); "
                "compare embedding models or rerankers"
            )
        if first.task == "embedding" and model.dim != first.dim:
            raise InputError(
                f"{model.name} gives vectors of {model.dim} values and {first.name} of "
                f"{first.dim}: they cannot be compared"
            )


def read_checkpoint(checkpoint: str | Path, first: ModelInfo) -> ModelSpec:
    """Read the checkpoint that peers serve: its configuration and its tensors' names and shapes.

    Args:
        checkpoint: A folder or hub id.
        first: The model that peers are compared with.

    Raises:
        InputError: There is no such folder or hub id; it is quantized; or its geometry differs.
        CheckpointError: It is not a Qwen3 checkpoint, or a tensor is missing or damaged.
    """
    spec = read_spec(fetch(checkpoint))
    if spec.quantization is not None:
        raise InputError(f"{checkpoint} is quantized, and peers serve plain checkpoints")
    if spec.adapter is not None:
        raise InputError(f"{checkpoint} is an adapter, and peers serve plain checkpoints")
    width = spec.hidden_size
    if width != first.hidden_size:
        raise InputError(
            f"{checkpoint} has hidden_size {width}, and {first.name} {first.hidden_size}: peers "
            "serve a checkpoint of the same geometry"
        )
    if first.task == "embedding" and first.dim != width:
        raise InputError(
            f"{first.name} gives vectors of {first.dim} values and peers of {width}: compare an "
            "artifact that was exported without a dimension of its own"
        )
    Weights(spec)
    return spec


def check_workloads(workloads: Sequence[Workload], models: Sequence[ModelInfo | ModelSpec]) -> None:
    """Check that every model takes every workload.

    Raises:
        InputError: A row is longer than a model's positions, or has an unknown token id.
    """
    for workload in workloads:
        largest = max(int(row.max()) for part in workload.parts for row in part)
        for model in models:
            name = model.name if isinstance(model, ModelInfo) else model.source.id
            if workload.longest > model.max_position_embeddings:
                raise InputError(
                    f"{name} takes at most {model.max_position_embeddings} tokens, and the "
                    f"workload {workload.name} has a row of {workload.longest}; `quick` stays "
                    "below 1,000"
                )
            if largest >= model.vocab_size:
                raise InputError(
                    f"{name} has {model.vocab_size} token ids, and the first artifact's tokenizer "
                    f"gives {largest}: compare models with one tokenizer"
                )


def check_space(peers: Sequence[Peer], spec: ModelSpec, cache: Path) -> None:
    """Check that the cache folder has room for the models that peers will write.

    Args:
        peers: The peers.
        spec: The checkpoint that they serve.
        cache: Folder for their models.

    Raises:
        InputError: The disk has too little free space.
    """
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    missing = [
        peer
        for peer in with_sources(peers)
        if peer.prepared and not any(cache.glob(f"{peer.name}-*"))
    ]
    needed = sum(spec.parameters * peer.bits // 8 for peer in missing)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{cache} has {size_words(free)} free, and {', '.join(peer.name for peer in missing)} "
            f"write at least {size_words(needed)}"
        )
