"""Load artifacts and checkpoints, and check an artifact against its witness."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeVar

from ..artifact.folder import Artifact
from ..checkpoint.spec import Task
from ..checkpoint.tokenizer import check_ids
from ..errors import InputError, UndeclaredTaskError, VerificationError
from ..texts.prompts import EmbeddingTokenizer, RerankerTokenizer
from .comparison import WIDER, Check, compare_witness
from .embedder import Embedder
from .info import Model, ModelInfo, choose_length, read_info
from .onnxruntime import OnnxModel, check_device
from .reranker import Reranker
from .stored_graph import find_stored_graph
from .tensorrt import TensorRTModel
from .torch import TorchModel, chooses_cpu

logger = logging.getLogger(__name__)

Tokenizer = TypeVar("Tokenizer")
TOKENIZER = "tokenizer.json"


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

    ONNX graphs run in onnxruntime; checkpoints, quantized or in fp32, fp16 or bf16, run in torch.
    On a CPU, a checkpoint with 4-bit codes that a graph can hold runs in onnxruntime too: its graph
    is built once, into the user's cache folder.

    Code that comes with a model is not run. The one exception is a version-compatible TensorRT
    engine, which contains code; its manifest says so.

    Args:
        model: The folder of an artifact or of a checkpoint in the hub's layout, or a hub id,
            optionally with a revision ("owner/name@revision").
        device: "cpu", "cuda", "tensorrt" (graphs only), or "auto": CUDA where it works, otherwise
            the CPU. The result's `device` says which one was chosen. A TensorRT engine runs on the
            GPU it was built for; with "cpu", its graph runs instead.
        max_length: Texts are cut to this many tokens; the model's own limit by default.
        check: Whether to require that an artifact reproduces the results of its export: see
            `check`.
        task: "embedding" or "reranker", needed if a checkpoint's files do not say which.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.

    Returns:
        An Embedder or a Reranker, depending on the model's task.

    Raises:
        InputError: There is no such folder or hub id, or `max_length` exceeds the model's
            positions.
        ArtifactError: A file of the artifact is missing or changed.
        CheckpointError: It is not a Qwen3 checkpoint, is incomplete, or has an unsupported format.
        DeviceError: The requested device is not available.
        MissingPackageError: The runtime it needs is not installed.
        VerificationError: With `check`, the results differ from those of the export; or a 4-bit
            checkpoint gives NaN on a CPU.

    >>> load(embedder, device="cpu").dim
    256
    """
    return _load(read_info(model, task, adapter), device, max_length, check)


def load_embedder(
    model: str | Path,
    *,
    device: str = "auto",
    max_length: int | None = None,
    check: bool = False,
    adapter: str | Path | None = None,
) -> Embedder:
    """Load an embedding model; as `load`, whose arguments it takes.

    Raises:
        InputError: It is a reranker. Otherwise as for `load`.

    >>> load_embedder(embedder, device="cpu").encode(["tea"]).shape
    (1, 256)
    """
    runner = _load(_read_as(model, "embedding", adapter), device, max_length, check)
    assert isinstance(runner, Embedder)
    return runner


def load_reranker(
    model: str | Path,
    *,
    device: str = "auto",
    max_length: int | None = None,
    check: bool = False,
    adapter: str | Path | None = None,
) -> Reranker:
    """Load a reranker; as `load`, whose arguments it takes.

    Raises:
        InputError: It is an embedding model. Otherwise as for `load`.

    >>> load_reranker(reranker, device="cpu").score([("What is tea?", "A hot drink.")]).shape
    (1,)
    """
    runner = _load(_read_as(model, "reranker", adapter), device, max_length, check)
    assert isinstance(runner, Reranker)
    return runner


def check(artifact: str | Path, *, device: str = "auto") -> Check:
    """Compare an artifact's results on this machine with those of its export.

    The export stores the token ids of 16 texts (or pairs) with their vectors (or scores). Neither
    torch nor the checkpoint is needed.

    Args:
        artifact: The folder of an artifact, or a hub id.
        device: As for `load`.

    Returns:
        The comparison; `passed` says whether all rows are within the precision's limit.

    Raises:
        InputError: It is a checkpoint, or `load` refuses it.
        ArtifactError: A file is missing or changed, or the artifact was exported without a witness.
        DeviceError: The requested device is not available.
        MissingPackageError: The runtime it needs is not installed.

    >>> check(embedder, device="cpu").passed
    True
    """
    return compare_witness(_run(read_info(artifact), device, None))


def _read_as(model: str | Path, task: Task, adapter: str | Path | None) -> ModelInfo:
    """A model's info, as of this task only where its files state none.

    Raises:
        InputError: They state the other task. A reranker gives vectors too, which mean nothing.
    """
    try:
        info = read_info(model, None, adapter)
    except UndeclaredTaskError:
        return read_info(model, task, adapter)
    if info.task != task:
        found, loader = (
            ("a reranker", "load_reranker")
            if info.task == "reranker"
            else ("an embedding model", "load_embedder")
        )
        raise InputError(f"{info.name} is {found}: use embedport.{loader}")
    return info


def _load(info: ModelInfo, device: str, max_length: int | None, check: bool) -> Embedder | Reranker:
    runner = _run(info, device, max_length)
    if not check:
        return runner
    result = compare_witness(runner)
    if not result.passed:
        why = "; ".join(result.reasons) or "nothing known differs: its files were changed"
        raise VerificationError(f"{runner.info.folder}: {result} ({why})")
    if WIDER in result.reasons:
        logger.warning("%s: %s (%s)", runner.info.folder, result, "; ".join(result.reasons))
    return runner


def _run(info: ModelInfo, device: str, max_length: int | None) -> Embedder | Reranker:
    length = choose_length(info, max_length)
    runner: Embedder | Reranker
    if info.task == "embedding":
        runner = Embedder(info, *_open(info, device, lambda: _embedding_tokenizer(info, length)))
    else:
        runner = Reranker(info, *_open(info, device, lambda: _reranker_tokenizer(info, length)))
    # Another run may have replaced the folder meanwhile: settings of the one, weights of the other.
    info.check_unchanged()
    return runner


def _embedding_tokenizer(info: ModelInfo, max_length: int) -> EmbeddingTokenizer:
    path = info.folder / TOKENIZER
    tokenizer = EmbeddingTokenizer(path, max_length, info.inputs)
    # These are the ids that every text gets.
    check_ids(tokenizer.encode(["."]).ids[0], info.vocab_size, path, "ids put around a text")
    return tokenizer


def _reranker_tokenizer(info: ModelInfo, max_length: int) -> RerankerTokenizer:
    path = info.folder / TOKENIZER
    tokenizer = RerankerTokenizer(path, max_length, info.inputs)
    ids = tokenizer.encode([(".", ".")]).ids[0]
    check_ids(ids, info.vocab_size, path, "ids put around a pair")
    return tokenizer


def _open(info: ModelInfo, device: str, read: Callable[[], Tokenizer]) -> tuple[Model, Tokenizer]:
    """Open the model and its tokenizer; `read` reads the tokenizer."""
    if info.checkpoint is not None:
        graph = find_stored_graph(info.checkpoint) if chooses_cpu(device) else None
        if graph is not None:
            model, tokenizer = _open_graph(graph, "cpu", read)
            model.precision = f"{info.precision} (computed in fp32)"
            return model, tokenizer
        tokenizer = read()
        return TorchModel(info.checkpoint, info.precision, device), tokenizer
    assert info.artifact is not None
    # An artifact with an engine also contains the engine's graph.
    if info.artifact.manifest.engine is None or device == "cpu":
        return _open_graph(info.artifact, device, read)
    check_device(device)
    tokenizer = read()
    return TensorRTModel(info.artifact), tokenizer


def _open_graph(
    artifact: Artifact, device: str, read: Callable[[], Tokenizer]
) -> tuple[Model, Tokenizer]:
    """Open a graph's session and its tokenizer at the same time: they take most of the start.

    Reading a tokenizer holds the interpreter lock. So it starts only when the session has parsed
    its graph and no longer needs the interpreter.
    """
    parsed = Event()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(OnnxModel, artifact, device, parsed.set)
        opening.add_done_callback(lambda _: parsed.set())
        parsed.wait()
        tokenizer = read()
        return opening.result(), tokenizer
