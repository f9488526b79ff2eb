"""The torch adapter: a checkpoint as it is, on the CPU or a CUDA device.

On CUDA the layers are our own, without padding: see packed.py. On a CPU, and in what only a library
computes, they are transformers'. There rows are moved so that each begins with its first token:
causal attention needs no mask then, since no real token comes after a padding token.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..engine import AMPERE
from ..errors import DeviceError, InputError, require
from ..prompts import load_tokenizer, token_id
from ..requirements import meets
from ..spec import ModelSpec
from ..stored import LibraryQuantization
from ..weights import Weights
from .batching import pad
from .checkpoint import ATTENTION_CHOICE, has_fp8_matrices, load_base, open_readers
from .facts import stored_float

logger = logging.getLogger(__name__)

# Compute capability from which products in fp8 take a scale for each token.
HOPPER = (9, 0)
# What FlashAttention takes, and the torch that has it for packed rows.
WIDEST_HEAD, OLDEST = 256, "2.11"

DEVICES = ("cpu", "cuda")
DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class TorchModel:
    """A checkpoint in torch: token ids in, vectors or scores out.

    Args:
        spec: The checkpoint.
        precision: Its precision, as a manifest has it.
        device: "cpu", "cuda", or "auto" for CUDA where torch has it and else the CPU.

    Attributes:
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
        head = None
        if spec.task == "reranker":
            head = torch.from_numpy(_read_head(spec)).to(self.device)
        finish = partial(_finish, torch, head)
        padded = "it is a CPU" if self.device == "cpu" else why_padded(spec, arithmetic)
        try:
            if padded is None:
                self._layers = open_packed(spec, arithmetic, finish)
            else:
                self._layers = PaddedLayers(load_layers(spec, self.device), self.device, finish)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{spec.source.folder} does not fit into the GPU's free memory; use device='cpu'"
            ) from error
        layers = "layers without padding" if padded is None else f"transformers' layers: {padded}"
        logger.info(
            "%s runs on %s in %s, in %s", spec.source.folder, self.device, self.precision, layers
        )

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
        lengths = attention_mask.sum(axis=1)
        try:
            return self._layers(input_ids[attention_mask != 0], lengths)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {len(lengths)} x {lengths.max()} tokens does not fit into the GPU's "
                "memory: use a smaller batch_tokens, or max_length"
            ) from error


class PaddedLayers:
    """transformers' layers: texts of one batch take the room of its longest.

    Args:
        base: A Qwen3Model.
        device: Where it is.
        finish: float32 [texts, hidden] after the last norm, to what is wanted of it.
    """

    def __init__(self, base: Any, device: str, finish: Callable[[Any], Any]) -> None:
        self._base, self._device, self._finish = base, device, finish

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As `PackedLayers`: texts end to end, int64 [tokens], and their lengths, int64 [texts]."""
        torch = require("torch", "torch")
        padded, _ = pad(np.split(ids, np.cumsum(lengths)[:-1]))
        choice = ATTENTION_CHOICE if self._device == "cuda" else nullcontext()
        with choice, torch.inference_mode():
            states = self._base(
                input_ids=torch.from_numpy(padded).to(self._device), use_cache=False
            ).last_hidden_state
            rows = torch.arange(len(padded), device=self._device)
            last = states[rows, torch.from_numpy(lengths - 1).to(self._device)].float()
            return self._finish(last).cpu().numpy()


def load_layers(spec: ModelSpec, device: str) -> Any:
    """A checkpoint as transformers' Qwen3Model, in the dtype that it is computed in.

    Args:
        spec: The checkpoint.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: What reads the checkpoint's format is not installed.
    """
    torch = require("torch", "torch")
    dtype = getattr(torch, DTYPE_NAMES[_choose_arithmetic(spec, device)])
    return load_base(spec, dtype, device)


def why_padded(spec: ModelSpec, arithmetic: str) -> str | None:
    """Why a checkpoint does not run in our own layers on the CUDA device; None where it does.

    Args:
        spec: The checkpoint.
        arithmetic: What it is computed in, "fp16", "bf16" or "fp32".
    """
    torch = require("torch", "torch")
    capability = torch.cuda.get_device_capability()
    quantized = isinstance(spec.quantization, LibraryQuantization)
    # Triton compiles what launches its kernels.
    compilers = [os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")]
    obstacles = {
        "fp32 is for exactness": arithmetic == "fp32",
        "its matrices are another library's": quantized and not has_fp8_matrices(spec),
        "fp8 is multiplied beside bf16, on Hopper and later": quantized
        and (arithmetic != "bf16" or capability < HOPPER),
        "heads are wider than 256": spec.head_dim > WIDEST_HEAD,
        "the GPU is older than Ampere": capability < AMPERE,
        f"torch is older than {OLDEST}": not meets(f"torch>={OLDEST}", torch.__version__),
        "torch is built without FlashAttention for CUDA": torch.version.hip is not None
        or not torch.backends.cuda.is_flash_attention_available(),
        "Triton is not installed": find_spec("triton") is None,
        "Triton finds no C compiler": not any(compilers),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def open_packed(spec: ModelSpec, arithmetic: str, finish: Callable[[Any], Any]) -> Any:
    """A checkpoint's layers on the CUDA device, where `why_padded` has no reason against it."""
    from .packed import PackedLayers

    torch = require("torch", "torch")
    dtype = getattr(torch, DTYPE_NAMES[arithmetic])
    read, read_scales = open_readers(spec)
    return PackedLayers(spec, dtype, "cuda", read, read_scales, finish)


def _finish(torch: Any, head: Any, last: Any) -> Any:
    """Vectors of unit length; with a head, probabilities."""
    if head is None:
        return torch.nn.functional.normalize(last, dim=1)
    return torch.sigmoid(last @ head)


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


def _read_head(spec: ModelSpec) -> np.ndarray:
    """W_yes - W_no, the head's own tensor alone being read: float32 [hidden]."""
    path = spec.source.folder / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    yes, no = (token_id(tokenizer, word, path) for word in ("yes", "no"))
    return Weights(spec, [spec.head]).answer_row(yes, no)
