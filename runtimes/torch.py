"""The torch backend: a checkpoint as it is, on the CPU or a CUDA device.

On CUDA the layers are embedport's own, without padding: see varlen.py. On a CPU, and for formats
that only a library computes, they are transformers'. These get right-padded rows: no real token
follows a padding token, so causal attention needs no mask.
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

from ..checkpoint.lora import open_floats
from ..checkpoint.pipeline import Outputs
from ..checkpoint.pooling import Head, pool
from ..checkpoint.quantization_config import LibraryQuantization
from ..checkpoint.spec import ModelSpec
from ..errors import DeviceError, InputError, require
from ..machine.engine import AMPERE
from ..quantize.formats import matrices
from ..requirements import meets
from ..texts.prompts import find_answers
from .batching import pad
from .checkpoint import ATTENTION_CHOICE, has_fp8_matrices, load_base, rounds_tokens
from .info import stored_float

logger = logging.getLogger(__name__)

# The first compute capability with fp8 products that take one scale per token.
HOPPER = (9, 0)
# What divides the sizes of 8-bit matrices that a GPU multiplies.
SIZES = 16
# The first torch that has FlashAttention for variable-length batches; its heads have at most 256
# values, as a checkpoint's have.
OLDEST = "2.11"

DEVICES = ("cpu", "cuda")
DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class TorchModel:
    """A checkpoint in torch: token ids in, vectors or scores out.

    Args:
        spec: The checkpoint.
        precision: Its precision, as in a manifest.
        device: "cpu", "cuda", or "auto": CUDA where torch has it, otherwise the CPU.

    Attributes:
        device: The device it runs on.
        precision: The storage format and the arithmetic, in words.

    Raises:
        InputError: A checkpoint does not run on `device`.
        DeviceError: The device is not available, or the model does not fit.
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: torch, transformers or the package that reads the format is missing.
    """

    def __init__(self, spec: ModelSpec, precision: str, device: str = "auto") -> None:
        torch = require("torch", "torch")
        self._pid = os.getpid()
        self.device = find_device(torch, device)
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
        reason = "it is a CPU" if self.device == "cpu" else why_padded(spec, arithmetic)
        try:
            if reason is None:
                self._layers: Any = open_packed(spec, arithmetic, finish)
            else:
                base = load_layers(spec, self.device)
                self._layers = PaddedLayers(base, self.device, finish, spec)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{spec.source.folder} does not fit into the GPU's free memory; use device='cpu'"
            ) from error
        layers = "layers without padding" if reason is None else f"transformers' layers: {reason}"
        logger.info(
            "%s runs on %s in %s, in %s", spec.source.folder, self.device, self.precision, layers
        )

    def __call__(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, prompt_length: int = 0
    ) -> np.ndarray:
        """Run a batch: see `Model`.

        Raises:
            InputError: The batch does not fit into the GPU's memory.
            DeviceError: The model is on a GPU, and was opened before this process was forked.
        """
        torch = require("torch", "torch")
        self.check_process()
        lengths = attention_mask.sum(axis=1)
        ids = input_ids[attention_mask != 0]
        try:
            if self._pools:
                results = self._layers.pooled(ids, lengths, prompt_length)
            else:
                results = self._layers(ids, lengths)
            return results if self._head is None else self._head(results)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a batch of {len(lengths)} x {lengths.max()} tokens does not fit into the GPU's "
                "memory: use a smaller `batch_tokens`, or `max_length`"
            ) from error

    def check_process(self) -> None:
        """Continue in a fork of the process that opened the model: torch's threads are missing.

        On a CPU, torch then runs on one thread; CUDA does not survive a fork.

        Raises:
            DeviceError: The model is on a GPU.
        """
        if self._pid == os.getpid():
            return
        if self.device != "cpu":
            raise DeviceError(
                "the model was opened before this process was forked, and CUDA does not survive a "
                "fork: open it in each worker (gunicorn without --preload, or in its post_fork "
                "hook), or start workers by 'spawn'"
            )
        self._pid = os.getpid()
        require("torch", "torch").set_num_threads(1)
        logger.warning(
            "the model was opened before this process was forked: it runs on one thread here; open "
            "it in each worker to use more"
        )


class PaddedLayers:
    """transformers' layers: the texts of a batch are padded to its longest.

    Args:
        base: A Qwen3Model.
        device: Its device.
        finish: Maps float32 [texts, hidden] after the final norm to the results.
        spec: The checkpoint.
    """

    def __init__(
        self, base: Any, device: str, finish: Callable[[Any], Any], spec: ModelSpec
    ) -> None:
        self._base, self._device, self._finish, self._spec = base, device, finish, spec

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run texts, int64 [tokens] end to end, of `lengths`, int64 [texts]: as `PackedLayers`."""
        torch = require("torch", "torch")
        with self._running(ids, lengths) as (states, _):
            rows = torch.arange(len(lengths), device=self._device)
            last = states[rows, torch.from_numpy(lengths - 1).to(self._device)].float()
            return self._finish(last).cpu().numpy()

    def pooled(self, ids: np.ndarray, lengths: np.ndarray, prompt_length: int) -> np.ndarray:
        """As `__call__`, but pool the hidden states of all tokens: float32 [texts, width]."""
        with self._running(ids, lengths) as (states, mask):
            values = states.float().cpu().numpy()
            return pool(values, mask, self._spec.outputs, prompt_length)

    @contextmanager
    def _running(self, ids: np.ndarray, lengths: np.ndarray) -> Generator[tuple[Any, np.ndarray]]:
        """Yield (states after the final norm [texts, longest, hidden], mask [texts, longest])."""
        torch = require("torch", "torch")
        padded, mask = pad(np.split(ids, np.cumsum(lengths)[:-1]))
        choice = ATTENTION_CHOICE if self._device == "cuda" else nullcontext()
        extra = {}
        if not self._spec.causal:  # without a mask, tokens would attend to padding
            extra["attention_mask"] = torch.from_numpy(mask).to(self._device)
        with choice, torch.inference_mode():
            yield (
                self._base(
                    input_ids=torch.from_numpy(padded).to(self._device), use_cache=False, **extra
                ).last_hidden_state,
                mask,
            )


def load_layers(spec: ModelSpec, device: str) -> Any:
    """Load a checkpoint as transformers' Qwen3Model, in the dtype it is computed in.

    Args:
        spec: The checkpoint.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: The package that reads the checkpoint's format is not installed.
    """
    torch = require("torch", "torch")
    dtype = getattr(torch, DTYPE_NAMES[_choose_arithmetic(spec, device)])
    return load_base(spec, dtype, device)


def why_padded(spec: ModelSpec, arithmetic: str) -> str | None:
    """Why a checkpoint cannot run in `PackedLayers` on the CUDA device; None if it can.

    Args:
        spec: The checkpoint.
        arithmetic: The dtype it is computed in, "fp16", "bf16" or "fp32".
    """
    torch = require("torch", "torch")
    capability = torch.cuda.get_device_capability()
    quantized = isinstance(spec.quantization, LibraryQuantization)
    # Triton compiles its kernels' launchers with a C compiler.
    compilers = [os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")]
    obstacles = {
        "fp32 is for exactness": arithmetic == "fp32",
        "its matrices are another library's": quantized and not _stays_packed(spec),
        "fp8 is multiplied beside bf16, on Hopper and later": has_fp8_matrices(spec)
        and (arithmetic != "bf16" or capability < HOPPER),
        "attention is bidirectional": not spec.causal,
        "layers have a sliding window": bool(spec.window_layers),
        "attention has biases": spec.attention_bias,
        "it does not pool the last token": not spec.outputs.last_token,
        "the GPU is older than Ampere": capability < AMPERE,
        f"torch is older than {OLDEST}": not meets(f"torch>={OLDEST}", torch.__version__),
        "torch is built without FlashAttention for CUDA": torch.version.hip is not None
        or not torch.backends.cuda.is_flash_attention_available(),
        "Triton is not installed": find_spec("triton") is None,
        "Triton finds no C compiler": not any(compilers),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _stays_packed(spec: ModelSpec) -> bool:
    """Whether our layers multiply by the codes of a format that a library owns."""
    if rounds_tokens(spec):
        shapes = [spec.tensor_shapes()[f"{name}.weight"] for name in matrices(spec)]
        return not any(size % SIZES for shape in shapes for size in shape)
    from .packed.nf4 import has_nf4_matrices

    return has_nf4_matrices(spec)


def open_packed(spec: ModelSpec, arithmetic: str, finish: Callable[[Any], Any]) -> Any:
    """Open a checkpoint as `PackedLayers` on the CUDA device; only if `why_padded` gives None."""
    from .packed.reading import open_checkpoint
    from .varlen import PackedLayers

    torch = require("torch", "torch")
    dtype = getattr(torch, DTYPE_NAMES[arithmetic])
    return PackedLayers(spec, dtype, "cuda", open_checkpoint(spec, dtype, "cuda"), finish)


def _finish(torch: Any, head: Any, outputs: Outputs, last: Any) -> Any:
    """Return the states unchanged, or with a head the scores."""
    if head is None:
        return last
    scores = last @ head
    return torch.sigmoid(scores) if outputs.activation == "sigmoid" else scores


def chooses_cpu(device: str) -> bool:
    """Whether a checkpoint opened on `device` runs on the CPU; false for an unknown device."""
    if device != "auto":
        return device == "cpu"
    return find_spec("torch") is None or not require("torch", "torch").cuda.is_available()


def find_device(torch: Any, device: str) -> str:
    """The device a checkpoint runs on, "cpu" or "cuda".

    Args:
        torch: The module.
        device: "cpu", "cuda" or "auto".

    Raises:
        InputError: Another device was asked for.
        DeviceError: torch has no GPU.
    """
    if device not in (*DEVICES, "auto"):
        raise InputError(
            f"a checkpoint runs on auto, {', '.join(DEVICES)}; found device {device!r}"
        )
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceError(
            f"torch {torch.__version__} has no CUDA device on this machine; use device='cpu'"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def _choose_arithmetic(spec: ModelSpec, device: str) -> str:
    """The stored dtype; on a CPU fp32 for fp16, which it has no fast arithmetic for.

    There it is fp32 for activations that are rounded to 8 bits, too: see `rounded_linear`.
    """
    stored = stored_float(spec)
    wide = device == "cpu" and (stored == "fp16" or rounds_tokens(spec))
    return "fp32" if wide else stored


def _read_head(spec: ModelSpec) -> np.ndarray:
    """Read W_yes - W_no, float32 [hidden], from the head's tensor only."""
    return open_floats(spec, [spec.head]).answer_row(*find_answers(spec))
