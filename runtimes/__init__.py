"""Runtimes: artifacts and checkpoints run here, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeVar

from ..artifact import Artifact
from ..errors import VerificationError
from ..prompts import EmbeddingTokenizer, RerankerTokenizer
from ..spec import Task
from ..tokenizer import check_ids
from .comparison import Check, compare_witness
from .embedder import Embedder
from .facts import Model, ModelFacts, choose_length, read_facts
from .onnxruntime import OnnxModel, check_device
from .reranker import Ranked, Reranker
from .tensorrt import TensorRTModel
from .torch import TorchModel

Tokenizer = TypeVar("Tokenizer")
TOKENIZER = "tokenizer.json"

__all__ = [
    "Check",
    "Embedder",
    "ModelFacts",
    "Ranked",
    "Reranker",
    "check",
    "load",
    "read_facts",
]


def load(
    model: str | Path,
    *,
    device: str = "auto",
    max_length: int | None = None,
    check: bool = False,
    task: Task | None = None,
    adapter: str | Path | None = None,
) -> Embedder | Reranker:
    """Load an artifact, or a Qwen3 checkpoint as it is.

    ONNX graphs run in onnxruntime; checkpoints, quantized or in fp32, fp16 or bf16, in torch. No
    code that comes with a model is run, but that of a TensorRT engine built for later versions too:
    it brings some, as its manifest says.

    Args:
        model: The folder of an artifact or of a checkpoint in the hub's layout, or a hub id, with a
            revision if need be ("owner/name@revision").
        device: "cpu", "cuda", "tensorrt" (graphs only), or "auto" for CUDA where it works and else
            the CPU; the result's `device` says which it got. A TensorRT engine runs on the GPU it
            was built for, and its graph on the CPU if that is asked for.
        max_length: Tokens after which a text is cut; the model's own by default.
        check: Whether an artifact must give here what it gave where it was exported: see `check`.
        task: "embedding" or "reranker", for a checkpoint whose files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.

    Returns:
        An Embedder or a Reranker, as the model's task is.

    Raises:
        InputError: No such folder or hub id, or `max_length` is beyond the model's positions.
        ArtifactError: A file of the artifact is missing or changed.
        CheckpointError: It is not a Qwen3 checkpoint, not whole, or in a format that is not read.
        DeviceError: The device asked for is not there.
        MissingPackageError: What runs it is not installed.
        VerificationError: With `check`, the results here are not those of the export.
    """
    loaded = _load(model, device, max_length, task, adapter)
    if check and not (result := compare_witness(loaded)).passed:
        why = "; ".join(result.reasons) or "nothing known differs: its files were changed"
        raise VerificationError(f"{loaded.facts.folder}: {result} ({why})")
    return loaded


def check(artifact: str | Path, *, device: str = "auto") -> Check:
    """Compare what an artifact gives here with what it gave where it was exported.

    `export` keeps the token ids of 16 texts, or pairs, and their vectors, or scores. Neither torch
    nor the checkpoint is needed.

    Args:
        artifact: The folder of an artifact, or a hub id.
        device: As for `load`.

    Returns:
        The comparison; `passed` says whether all rows are within the precision's limit.

    Raises:
        InputError: It is a checkpoint, or `load` does not take it.
        ArtifactError: A file is missing or changed, or the artifact was exported without a witness.
        DeviceError: The device asked for is not there.
        MissingPackageError: What runs it is not installed.
    """
    return compare_witness(_load(artifact, device, None, None, None))


def _load(
    model: str | Path,
    device: str,
    max_length: int | None,
    task: Task | None,
    adapter: str | Path | None,
) -> Embedder | Reranker:
    facts = read_facts(model, task, adapter)
    length = choose_length(facts, max_length)
    if facts.task == "embedding":
        return Embedder(facts, *_open(facts, device, lambda: _embedding_tokenizer(facts, length)))
    return Reranker(facts, *_open(facts, device, lambda: _reranker_tokenizer(facts, length)))


def _embedding_tokenizer(facts: ModelFacts, max_length: int) -> EmbeddingTokenizer:
    path = facts.folder / TOKENIZER
    tokenizer = EmbeddingTokenizer(path, max_length, facts.inputs)
    # What every text gets.
    check_ids(tokenizer.encode(["."]).ids[0], facts.vocab_size, path, "ids put around a text")
    return tokenizer


def _reranker_tokenizer(facts: ModelFacts, max_length: int) -> RerankerTokenizer:
    path = facts.folder / TOKENIZER
    tokenizer = RerankerTokenizer(path, max_length, facts.inputs)
    ids = tokenizer.encode([(".", ".")]).ids[0]
    check_ids(ids, facts.vocab_size, path, "ids put around a pair")
    return tokenizer


def _open(facts: ModelFacts, device: str, read: Callable[[], Tokenizer]) -> tuple[Model, Tokenizer]:
    """The model, and its tokenizer, which `read` reads."""
    if facts.checkpoint is not None:
        tokenizer = read()
        return TorchModel(facts.checkpoint, facts.precision, device), tokenizer
    assert facts.artifact is not None
    # An artifact with an engine has the engine's graph too.
    if facts.artifact.manifest.engine is None or device == "cpu":
        return _open_graph(facts.artifact, device, read)
    check_device(device)
    tokenizer = read()
    return TensorRTModel(facts.artifact), tokenizer


def _open_graph(
    artifact: Artifact, device: str, read: Callable[[], Tokenizer]
) -> tuple[Model, Tokenizer]:
    """A graph's session, and meanwhile the tokenizer: the two are most of a start.

    A tokenizer is read without letting any other thread run: the session has to have come to where
    it needs no interpreter.
    """
    parsed = Event()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(OnnxModel, artifact, device, parsed.set)
        opening.add_done_callback(lambda _: parsed.set())
        parsed.wait()
        tokenizer = read()
        return opening.result(), tokenizer
