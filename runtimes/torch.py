"""The torch adapter: a checkpoint as it is, on the CPU or a CUDA device.

Rows are moved so that each begins with its first token. Then causal attention needs no mask, since
no real token comes after a padding token, and SDPA and FlashAttention take their fast paths.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import DeviceError, InputError, require
from ..prompts import load_tokenizer, token_id
from ..spec import ModelSpec
from ..weights import Weights
from .checkpoint import load_base
from .facts import stored_float

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class TorchModel:
    """A checkpoint in torch: token ids in, vectors or scores out.

    Args:
        spec: The checkpoint.
        precision: Its precision, as a manifest has it.
        device: "cpu", "cuda", or "auto" for CUDA where torch has it and else the CPU.

    Attributes:
        base: transformers' Qwen3Model.
        device: Where it is.
        precision: What is stored and what is computed in, in words.

    Raises:
        InputError: There is no such device for a checkpoint.
        DeviceError: It is not there, or the model does not fit.
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: torch, transformers or the package that reads the format is missing.
    """

    def __init__(self, spec: ModelSpec, precision: str, device: str = "auto") -> None:
        torch = require("torch", "torch")
        self.device = _find_device(torch, device)
        arithmetic = _choose_arithmetic(spec, self.device)
        self.precision = precision
        if arithmetic != precision:
            self.precision += f" (computed in {arithmetic})"
        dtype = getattr(torch, DTYPE_NAMES[arithmetic])
        attention = _choose_attention(self.device, arithmetic)
        try:
            self.base = load_base(spec, dtype, self.device, attention)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{spec.source.folder} does not fit into the GPU's free memory; use device='cpu'"
            ) from error
        self._head = None
        if spec.task == "reranker":
            self._head = torch.from_numpy(_read_head(spec)).to(self.device)
        logger.info("%s runs on %s in %s", spec.source.folder, self.device, self.precision)

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Run a batch.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 at real tokens, padding on either side.

        Returns:
            float32: embeddings [batch, dim] of unit length, or scores [batch].

        Raises:
            InputError: The batch does not fit into the GPU's memory.
        """
        torch = require("torch", "torch")
        ids, lengths = align(input_ids, attention_mask)
        try:
            with torch.inference_mode():
                states = self.base(
                    input_ids=torch.from_numpy(ids).to(self.device), use_cache=False
                ).last_hidden_state
                rows = torch.arange(len(ids), device=self.device)
                last = states[rows, torch.from_numpy(lengths - 1).to(self.device)].float()
                if self._head is None:
                    results = torch.nn.functional.normalize(last, dim=1)
                else:
                    results = torch.sigmoid(last @ self._head)
                return results.cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {ids.shape[0]} x {ids.shape[1]} tokens does not fit into the GPU's "
                "memory: use a smaller batch_tokens, or max_length"
            ) from error


def align(input_ids: np.ndarray, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move each row to the left and cut the padding that no row needs.

    Args:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, sequence], real tokens without gaps.

    Returns:
        (ids, lengths): int64 [batch, longest] and [batch].
    """
    lengths = attention_mask.sum(axis=1)
    columns = np.arange(lengths.max()) + attention_mask.argmax(axis=1)[:, None]
    return np.take_along_axis(input_ids, columns % input_ids.shape[1], axis=1), lengths


def _find_device(torch: Any, device: str) -> str:
    if device not in (*DEVICES, "auto"):
        raise InputError(
            f"a checkpoint runs on auto, {', '.join(DEVICES)}; found device {device!r}"
        )
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise DeviceError(
            f"torch {torch.__version__} has no CUDA device on this machine; use device='cpu'"
        )
    return "cuda" if there and device != "cpu" else "cpu"


def _choose_arithmetic(spec: ModelSpec, device: str) -> str:
    """What the checkpoint stores; a CPU has no fp16 arithmetic worth the name."""
    stored = stored_float(spec)
    return "fp32" if device == "cpu" and stored == "fp16" else stored


def _choose_attention(device: str, arithmetic: str) -> str:
    flash = device == "cuda" and arithmetic != "fp32" and find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def _read_head(spec: ModelSpec) -> np.ndarray:
    """W_yes - W_no, the head's own tensor alone being read: float32 [hidden]."""
    path = spec.source.folder / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    yes, no = (token_id(tokenizer, word, path) for word in ("yes", "no"))
    return Weights(spec, [spec.head]).answer_row(yes, no)
