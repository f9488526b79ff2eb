"""Runtimes: artifacts run here, behind one interface."""

from __future__ import annotations

from pathlib import Path

from ..artifact import Artifact
from ..errors import InputError
from ..prompts import EmbeddingTokenizer, RerankerTokenizer
from .embedder import Embedder
from .onnxruntime import OnnxModel, check_device
from .reranker import Ranked, Reranker
from .tensorrt import TensorRTModel

__all__ = ["Embedder", "Ranked", "Reranker", "load"]


def load(
    folder: str | Path, *, device: str = "auto", max_length: int | None = None
) -> Embedder | Reranker:
    """Load an artifact.

    Args:
        folder: The artifact's folder.
        device: "cpu", "cuda", "tensorrt", or "auto" for CUDA where it works and else the CPU;
            the result's `device` says which it got. An artifact with a TensorRT engine runs on
            the GPU it was built for, or its graph on the CPU if that is asked for.
        max_length: Tokens after which a text is cut; the artifact's own by default.

    Returns:
        An Embedder or a Reranker, as the artifact's task is.

    Raises:
        InputError: No such folder, or `max_length` is beyond the model's positions.
        ArtifactError: It is not an artifact, or a file is missing or changed.
        DeviceError: The device asked for is not there.
    """
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    max_length = manifest.max_length if max_length is None else max_length
    if not 1 <= max_length <= manifest.max_position_embeddings:
        raise InputError(
            f"max_length should be from 1 to {manifest.max_position_embeddings}, found {max_length}"
        )
    tokenizer_file = artifact.folder / "tokenizer.json"
    if manifest.task == "embedding":
        tokenizer = EmbeddingTokenizer(tokenizer_file, max_length)
        model = _open_model(artifact, device)
        return Embedder(artifact, model, tokenizer, device=model.device)
    pair_tokenizer = RerankerTokenizer(tokenizer_file, max_length)
    model = _open_model(artifact, device)
    return Reranker(artifact, model, pair_tokenizer, device=model.device)


def _open_model(artifact: Artifact, device: str) -> OnnxModel | TensorRTModel:
    # An artifact with an engine has the engine's graph too, which runs on a CPU.
    if artifact.manifest.engine is None or device == "cpu":
        return OnnxModel(artifact, device)
    check_device(device)
    return TensorRTModel(artifact)
