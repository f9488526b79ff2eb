"""Open a checkpoint as the reference that runs here: the choice of its library."""

from __future__ import annotations

from pathlib import Path

from ..bitsandbytes_ import importing_bitsandbytes
from ..checkpoint.hub import fetch
from ..checkpoint.spec import Task, read_spec
from ..errors import CheckpointError, require
from .card import CardReference
from .library import LibraryReference, is_library_model
from .live import LiveReference, find_device


def open_live(
    checkpoint: str | Path,
    *,
    task: Task | None = None,
    max_length: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    adapter: str | Path | None = None,
) -> LiveReference:
    """Find a checkpoint, check its weights' names and shapes, and choose the library that runs it.

    Args:
        checkpoint: A folder, or a hub id.
        task: "embedding" or "reranker"; None if its files declare the task.
        max_length: Tokens after which an input is cut; None for the library's own limit.
        revision: A branch, tag or commit, for a hub id.
        device: As for the artifact: "cpu", or else torch's GPU if there is one.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.

    Raises:
        InputError: No such folder or hub id.
        CheckpointError: It is not a Qwen3 checkpoint, or it is incomplete or quantized.
        MissingPackageError: torch, transformers or sentence-transformers is not installed, or PEFT
            for an adapter.
    """
    # sentence-transformers imports PEFT, and PEFT bitsandbytes, where they are installed.
    with importing_bitsandbytes():
        for package in ("torch", "transformers", "sentence_transformers"):
            require(package, "torch")
    spec = read_spec(fetch(checkpoint, revision, adapter=adapter), task)
    if spec.adapter is not None:
        with importing_bitsandbytes():
            require("peft", "torch")
    if spec.quantization is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: a reference should be the original in bf16, "
            f"fp16 or fp32, found one quantized by {spec.quantization.method!r}"
        )
    kind = LibraryReference if is_library_model(spec) else CardReference
    return kind(spec, max_length, find_device(device))
