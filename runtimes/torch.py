"""The torch adapter: a checkpoint as it is, on the CPU or a CUDA device.

On CUDA the layers are our own, without padding: see packed.py. On a CPU, and in what only a library
computes, they are transformers'. There rows are moved so that each begins with its first token:
causal attention needs no mask then, since no real token comes after a padding token.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..engine import AMPERE
from ..errors import DeviceError, InputError, require
from ..lora import open_floats
from ..pipeline import Outputs
from ..pooling import Head, pool
from ..prompts import find_answers
from ..requirements import meets
from ..spec import ModelSpec
from ..stored import LibraryQuantization
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
        self._pid = os.getpid()
        self.device = _find_device(torch, device)
        arithmetic = _choose_arithmetic(spec, self.device)
        self.precision = precision
        if arithmetic != precision:
            self.precision += f" (computed in {arithmetic})"
        head = None
        if spec.task == "reranker":
            head = torch.from_numpy(_read_head(spec)).to(self.device)
        finish = partial(_finish, torch, head, spec.outputs)
        self._head = None if head is not None else Head(spec.outputs, spec.source.pipeline)
        self._pools = not spec.outputs.last_token
        padded = "it is a CPU" if self.device == "cpu" else why_padded(spec, arithmetic)
        try:
            if padded is None:
                self._layers: Any = open_packed(spec, arithmetic, finish)
            else:
                base = load_layers(spec, self.device)
                self._layers = PaddedLayers(base, self.device, finish, spec)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{spec.source.folder} does not fit into the GPU's free memory; use device='cpu'"
            ) from error
        layers = "layers without padding" if padded is None else f"transformers' layers: {padded}"
        logger.info(
            "%s runs on %s in %s, in %s", spec.source.folder, self.device, self.precision, layers
        )

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

        Raises:
            InputError: The batch does not fit into the GPU's memory.
            DeviceError: The process is a fork of the one that opened the model.
        """
        torch = require("torch", "torch")
        self.check_process()
        lengths = attention_mask.sum(axis=1)
        ids = input_ids[attention_mask != 0]
        try:
            if self._pools:
                found = self._layers.pooled(ids, lengths, prompt_length)
            else:
                found = self._layers(ids, lengths)
            return found if self._head is None else self._head(found)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {len(lengths)} x {lengths.max()} tokens does not fit into the GPU's "
                "memory: use a smaller batch_tokens, or max_length"
            ) from error

    def check_process(self) -> None:
        """Refuse to run in a fork of the process that opened the model, where torch would hang.

        Raises:
            DeviceError: This is one.
        """
        if self._pid != os.getpid():
            raise DeviceError(
                "the model was opened before this process was forked, and torch's threads and CUDA "
                "do not survive a fork: open it in each worker (gunicorn without --preload, or in "
                "its post_fork hook), or start workers by 'spawn'"
            )


class PaddedLayers:
    """transformers' layers: texts of one batch take the room of its longest.

    Args:
        base: A Qwen3Model.
        device: Where it is.
        finish: float32 [texts, hidden] after the last norm, to what is wanted of it.
        spec: The checkpoint.
    """

    def __init__(
        self, base: Any, device: str, finish: Callable[[Any], Any], spec: ModelSpec
    ) -> None:
        self._base, self._device, self._finish, self._spec = base, device, finish, spec

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As `PackedLayers`: texts end to end, int64 [tokens], and their lengths, int64 [texts]."""
        torch = require("torch", "torch")
        with self._running(ids, lengths) as (states, _):
            rows = torch.arange(len(lengths), device=self._device)
            last = states[rows, torch.from_numpy(lengths - 1).to(self._device)].float()
            return self._finish(last).cpu().numpy()

    def pooled(self, ids: np.ndarray, lengths: np.ndarray, prompt_length: int) -> np.ndarray:
        """As `__call__`, with the states of all tokens pooled: float32 [texts, width]."""
        with self._running(ids, lengths) as (states, mask):
            found = states.float().cpu().numpy()
            return pool(found, mask, self._spec.outputs, prompt_length)

    @contextmanager
    def _running(self, ids: np.ndarray, lengths: np.ndarray) -> Generator[tuple[Any, np.ndarray]]:
        """(states after the last norm [texts, longest, hidden], the mask [texts, longest])."""
        torch = require("torch", "torch")
        padded, mask = pad(np.split(ids, np.cumsum(lengths)[:-1]))
        choice = ATTENTION_CHOICE if self._device == "cuda" else nullcontext()
        further = {}
        if not self._spec.causal:  # then tokens see the padding behind them
            further["attention_mask"] = torch.from_numpy(mask).to(self._device)
        with choice, torch.inference_mode():
            yield (
                self._base(
                    input_ids=torch.from_numpy(padded).to(self._device), use_cache=False, **further
                ).last_hidden_state,
                mask,
            )


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
        "attention goes both ways": not spec.causal,
        "layers have a sliding window": bool(spec.window_layers),
        "attention has biases": spec.attention_bias,
        "it pools other tokens than the last": not spec.outputs.last_token,
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


def _finish(torch: Any, head: Any, outputs: Outputs, last: Any) -> Any:
    """The states as they are; with a head, scores."""
    if head is None:
        return last
    scores = last @ head
    return torch.sigmoid(scores) if outputs.activation == "sigmoid" else scores


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
    return open_floats(spec, [spec.head]).answer_row(*find_answers(spec))
