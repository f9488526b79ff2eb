"""A checkpoint as transformers' Qwen3Model, filled without running anything that came with it.

Plain checkpoints, and GPTQ's and AWQ's codes, are read here tensor by tensor into a model that has
no memory of its own before (device "meta"): the process holds the model and one tensor more. A GPTQ
or AWQ matrix is unpacked, so in memory the model is as large as one that was never quantized.
bitsandbytes and 8-bit compressed-tensors checkpoints are loaded by transformers with those
libraries, whose own arithmetic runs: bitsandbytes keeps 8 and 4 bits in memory; compressed-tensors
unpacks the weights, and rounds each token's activations as servers' kernels do.

The configuration is made anew from the ModelSpec: nothing else in config.json is seen, so no code,
name or path in it is followed. Weights are safetensors only, in files beside their index.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, require
from ..files import TensorInfo, read_headers
from ..kernels import without_fetched_kernels
from ..quantize.stored import open_weights
from ..spec import ModelSpec
from ..stored import LibraryQuantization
from ..weights import DTYPES, Weights

ADAPTER = "adapter_config.json"


def load_base(spec: ModelSpec, dtype: Any, device: str, attention: str) -> Any:
    """Load a checkpoint's layers, without its head.

    Args:
        spec: The checkpoint.
        dtype: torch's, of what is not quantized and of what is between the matrices.
        device: "cpu" or "cuda".
        attention: transformers' name of the implementation of attention.

    Returns:
        A Qwen3Model, on the device.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: What reads the checkpoint's format is not installed.
    """
    folder = spec.source.folder
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: an adapter is not applied; merge it into the weights first"
        )
    if isinstance(spec.quantization, LibraryQuantization):
        return _load_by_library(spec, spec.quantization, dtype, device, attention)
    torch = require("torch", "torch")
    weights = open_weights(spec)
    config = _make_config(spec, attention)
    with torch.device("meta"):
        model = require("transformers", "torch").Qwen3Model(config)
    tensors = {name: _read(torch, weights, name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    # Its frequencies are computed, not stored, and still without memory.
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


def _make_config(spec: ModelSpec, attention: str) -> Any:
    return require("transformers", "torch").Qwen3Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        rope_theta=spec.rope_theta,
        tie_word_embeddings=spec.tied,
        attn_implementation=attention,
    )


def _read(torch: Any, weights: Weights, name: str) -> Any:
    values = weights.read(name)
    if values.dtype.name == "bfloat16":  # numpy's is ml_dtypes', which torch does not know
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _load_by_library(
    spec: ModelSpec, quantization: LibraryQuantization, dtype: Any, device: str, attention: str
) -> Any:
    transformers = require("transformers", "torch")
    if quantization.method == "bitsandbytes":
        with without_fetched_kernels():
            require("bitsandbytes", "quantize")
    else:
        require("compressed_tensors", "quantize")
    folder = spec.source.folder
    headers = read_headers(folder)  # no index leads outside
    _check_tensors(spec, headers)
    config = _make_config(spec, attention)
    config.quantization_config = dict(quantization.values)
    # What is left out of quantization is named in full: so are the modules, as they were then.
    prefixed = any(name.startswith("model.") for name in headers)
    kind = _prefixed_model(transformers) if prefixed else transformers.Qwen3Model
    with _silent(transformers):
        try:
            model, found = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, require("torch", "torch").OutOfMemoryError):
                raise
            raise CheckpointError(
                f"{folder}: {quantization.method} does not take it: {error}; quantize it again"
            ) from error
    # transformers fills in what is missing with random numbers.
    for problem in ("missing_keys", "mismatched_keys"):
        if found[problem]:
            raise CheckpointError(
                f"{folder}: tensor {sorted(map(str, found[problem]))[0]} is missing or has another "
                f"shape than {quantization.method} expects; quantize it again"
            )
    model.requires_grad_(False).eval()
    if quantization.method == "compressed-tensors":
        # It unpacks every matrix when the whole is first called.
        torch = require("torch", "torch")
        with _silent(transformers), torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)
    return model.model if prefixed else model


def _check_tensors(spec: ModelSpec, headers: Mapping[str, TensorInfo]) -> None:
    """Every tensor is there, and those that are not quantized have their shapes."""
    for name, shape in spec.tensor_shapes().items():
        info = headers.get(name) or headers.get(f"model.{name}")
        if info is None:
            raise CheckpointError(
                f"{spec.source.folder}: tensor {name} (or model.{name}) is missing; quantize it "
                "again"
            )
        if info.dtype in DTYPES and info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should have shape {list(shape)} by config.json, "
                f"found {list(info.shape)}"
            )


def _prefixed_model(transformers: Any) -> Any:
    """A model with Qwen3Model as `model`, as in every class with a head, and no head."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel

    class Headless(Qwen3PreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = transformers.Qwen3Model(config)
            self.post_init()

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    return Headless


@contextlib.contextmanager
def _silent(transformers: Any) -> Generator[None]:
    """No bars, and no word on the head's tensors, which are not used: errors are raised here."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # compressed-tensors has bars of its own, which nothing turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
