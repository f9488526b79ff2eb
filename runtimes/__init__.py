"""Runtimes: artifacts and checkpoints run here, behind one interface."""

from __future__ import annotations

from pathlib import Path

from ..prompts import EmbeddingTokenizer, RerankerTokenizer
from .embedder import Embedder
from .facts import Model, ModelFacts, choose_length, read_facts
from .onnxruntime import OnnxModel
from .reranker import Ranked, Reranker
from .torch import TorchModel

__all__ = ["Embedder", "ModelFacts", "Ranked", "Reranker", "load", "read_facts"]


def load(
    model: str | Path, *, device: str = "auto", max_length: int | None = None
) -> Embedder | Reranker:
    """Load an artifact, or a Qwen3 checkpoint as it is.

    ONNX graphs run in onnxruntime; checkpoints, quantized or in fp32, fp16 or bf16, in torch. No
    code that comes with a model is run.

    Args:
        model: The folder of an artifact or of a checkpoint in the hub's layout, or a hub id.
        device: "cpu", "cuda", "tensorrt" (graphs only), or "auto" for CUDA where it works and else
            the CPU; the result's `device` says which it got.
        max_length: Tokens after which a text is cut; the model's own by default.

    Returns:
        An Embedder or a Reranker, as the model's task is.

    Raises:
        InputError: No such folder or hub id, or `max_length` is beyond the model's positions.
        ArtifactError: A file of the artifact is missing or changed.
        CheckpointError: It is not a Qwen3 checkpoint, not whole, or in a format that is not read.
        DeviceError: The device asked for is not there.
        MissingPackageError: What runs it is not installed.
    """
    facts = read_facts(model)
    tokenizer_file = facts.folder / "tokenizer.json"
    length = choose_length(facts, max_length)
    if facts.task == "embedding":
        tokenizer = EmbeddingTokenizer(tokenizer_file, length)
        return Embedder(facts, _open_model(facts, device), tokenizer)
    pair_tokenizer = RerankerTokenizer(tokenizer_file, length)
    return Reranker(facts, _open_model(facts, device), pair_tokenizer)


def _open_model(facts: ModelFacts, device: str) -> Model:
    if facts.checkpoint is not None:
        return TorchModel(facts.checkpoint, facts.precision, device)
    assert facts.artifact is not None
    return OnnxModel(facts.artifact, device)
