"""Load a checkpoint as transformers' Qwen3Model, without running code that comes with it.

Plain checkpoints, and quantized formats that embedport reads itself
(`checkpoint.quantization_config`), are read tensor by tensor into a model on device "meta", which
has no memory of its own: the process holds the model and one more tensor. Quantized matrices are
unpacked, so the model takes as much memory as an unquantized one. 8-bit weights and activations
stay so on a CPU: see `rounded_linear`. bitsandbytes, and compressed-tensors' other forms of 8-bit
activations, are loaded by transformers and computed by those libraries: bitsandbytes keeps 8 and 4
bits in memory; compressed-tensors unpacks the weights and rounds the activations.

The configuration is built from the ModelSpec. Nothing else in config.json is read, so no code, name
or path in it is followed. Weights are safetensors only, in files beside their index.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import numpy as np
from safetensors import safe_open

from ..bitsandbytes_ import importing_bitsandbytes
from ..checkpoint.quantization_config import LibraryQuantization
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tensor_files import (
    TensorInfo,
    dtype_and_shape,
    find_tensor,
    open_holding,
    read_headers,
)
from ..checkpoint.weights import DTYPES, Weights
from ..errors import CheckpointError, MissingPackageError, require
from ..quantize.stored import open_weights, warn_of_activations
from ..requirements import meets
from .bitsandbytes_parts import check_parts

# The first transformers that reads is_causal.
BIDIRECTIONAL = "transformers>=5.2"
CONFIG = "config.json"
# How the names of what is quantized end: a bias is not.
MATRIX = "_proj.weight"
# What libraries raise for tensors and settings that do not fit.
LIBRARY_ERRORS = (
    *(RuntimeError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError),
)
# Precisions whose matrices and activations are 8-bit: safetensors' dtype of the matrices.
ROUNDED = {"fp8": "F8_E4M3", "w8a8": "I8"}
# Reads a tensor by its name: a torch tensor on the CPU, in the stored dtype.
Read = Callable[[str], Any]
# torch's choice of attention kernels is global to the process. Hold this lock to change it, or to
# run on CUDA with the default choice.
ATTENTION_CHOICE = threading.Lock()
# Of two threads that redirect the process's standard error, the second would put the first one's
# buffer in its place for good.
_SILENCE = threading.Lock()


def load_base(spec: ModelSpec, dtype: Any, device: str) -> Any:
    """Load a checkpoint's layers, without its head.

    Args:
        spec: The checkpoint.
        dtype: torch dtype of unquantized tensors and of activations.
        device: "cpu" or "cuda".

    Returns:
        A Qwen3Model, on the device.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
        MissingPackageError: The package that reads the checkpoint's format is not installed.
    """
    stays_rounded = device == "cpu" and rounds_tokens(spec)
    if isinstance(spec.quantization, LibraryQuantization) and not stays_rounded:
        return _load_by_library(spec, spec.quantization, dtype, device)
    torch = require("torch", "torch")
    read, read_scales = open_readers(spec)
    config = _make_config(spec)
    with torch.device("meta"):
        model = require("transformers", "torch").Qwen3Model(config)
    if stays_rounded:
        from .rounded_linear import round_projections

        assert read_scales is not None
        round_projections(model, read, read_scales)
    tensors = {name: read(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    # The rotary frequencies are not stored and are still on "meta": compute them anew.
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


def open_readers(spec: ModelSpec) -> tuple[Read, Read | None]:
    """Open a checkpoint for reading one tensor at a time, as torch tensors on the CPU.

    Args:
        spec: A plain checkpoint, a quantized one that embedport dequantizes, or one that another
            library runs; only the last one's matrices stay as they are stored.

    Returns:
        (read, read_scales). `read` takes a tensor's name in `spec.tensor_shapes()`. `read_scales`
        takes a matrix's name without ".weight" and gives its scales [out, 1]; it is None if
        `read` gives matrices in floating point.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
    """
    torch = require("torch", "torch")
    if not isinstance(spec.quantization, LibraryQuantization):
        warn_of_activations(spec)
        return partial(read_tensor, torch, open_weights(spec)), None
    headers = read_headers(spec.source.folder)
    _check_tensors(spec, headers)
    return (
        partial(read_stored, headers),
        lambda matrix: read_stored(headers, f"{matrix}.weight_scale"),
    )


def has_fp8_matrices(spec: ModelSpec) -> bool:
    """Whether all projections are float8_e4m3fn with one scale per output row and one per token."""
    quantization = spec.quantization
    return quantization is not None and quantization.precision == "fp8" and rounds_tokens(spec)


def rounds_tokens(spec: ModelSpec) -> bool:
    """Whether all projections are 8-bit with one scale per output row and one per token.

    They are float8_e4m3fn, or int8; neither has zero points.
    """
    quantization = spec.quantization
    if not isinstance(quantization, LibraryQuantization) or quantization.precision not in ROUNDED:
        return False
    dtype = ROUNDED[quantization.precision]
    (group,) = quantization.values["config_groups"].values()
    tokens = group["input_activations"]
    form = (tokens.get("strategy"), tokens.get("dynamic"), tokens.get("symmetric", True))
    headers = read_headers(spec.source.folder)
    is_symmetric = bool(group["weights"].get("symmetric", True))
    return (*form, is_symmetric) == ("token", True, True, True) and all(
        dtype_and_shape(headers, name) == (dtype, shape)
        and dtype_and_shape(headers, f"{name}_scale")[1] == (shape[0], 1)
        and find_tensor(headers, f"{name}_zero_point") is None
        for name, shape in spec.tensor_shapes().items()
        if name.endswith(MATRIX)
    )


def read_stored(headers: Mapping[str, TensorInfo], name: str) -> Any:
    """Read a tensor in its stored dtype, with torch: numpy has no fp8."""
    info = find_tensor(headers, name)
    assert info is not None
    with open_holding(info), safe_open(info.file, framework="pt") as shard:
        return shard.get_tensor(info.name)


def _make_config(spec: ModelSpec) -> Any:
    transformers = require("transformers", "torch")
    extra: dict[str, Any] = {}
    if spec.window_layers:
        types = ["full_attention"] * spec.num_layers
        for layer in spec.window_layers:
            types[layer] = "sliding_attention"
        extra = {
            "use_sliding_window": True,
            "sliding_window": spec.window,
            "layer_types": types,
        }
    if not spec.causal:
        extra["is_causal"] = False
    if not spec.causal and not meets(BIDIRECTIONAL, transformers.__version__):
        raise MissingPackageError(
            f"{spec.source.folder / CONFIG}: is_causal is false, which needs {BIDIRECTIONAL}, "
            f"found {transformers.__version__}"
        )
    return transformers.Qwen3Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters=spec.rope.to_parameters(),
        attention_bias=spec.attention_bias,
        tie_word_embeddings=spec.tied,
        attn_implementation="sdpa",
        **extra,
    )


def read_tensor(torch: Any, weights: Weights, name: str) -> Any:
    """Read a tensor as torch's, on the CPU, in the stored dtype."""
    values = weights.read(name)
    if values.dtype.name == "bfloat16":  # an ml_dtypes type, which torch does not accept
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _load_by_library(
    spec: ModelSpec, quantization: LibraryQuantization, dtype: Any, device: str
) -> Any:
    transformers = require("transformers", "torch")
    require_library(quantization)
    folder = spec.source.folder
    headers = read_headers(folder)  # refuses an index that leads outside the folder
    _check_tensors(spec, headers)
    if quantization.method == "bitsandbytes":
        check_parts(spec, quantization.precision, headers)
    config = _make_config(spec)
    config.quantization_config = dict(quantization.values)
    # The list of unquantized modules has full names, with "model." or without: module names must
    # match them.
    prefixed = any(name.startswith("model.") for name in headers)
    model_class = _prefixed_model(transformers) if prefixed else transformers.Qwen3Model
    library, again = f"{folder}: {quantization.method}", "quantize it again"
    with _silent(), _refusing(f"{library} cannot load it", again):
        model, loading_info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    # transformers fills missing tensors with random numbers.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading_info[problem]:
            raise CheckpointError(
                f"{folder}: tensor {sorted(map(str, loading_info[problem]))[0]} is missing or has "
                f"another shape than {quantization.method} expects; {again}"
            )
    _check_modules(spec, quantization, headers, model)
    model.requires_grad_(False).eval()
    # compressed-tensors unpacks its matrices at the first call, and bitsandbytes packs them again,
    # which on CPUs with bf16 takes whole blocks of 64 inputs only: make that call here.
    torch = require("torch", "torch")
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    advice = (
        "quantize the original again"
        if quantization.method == "bitsandbytes"
        else f"{again}, or export it, which unpacks its weights"
    )
    refusing = _refusing(f"{library} cannot run it on {device}", advice)
    with _silent(), refusing, torch.no_grad():
        model(input_ids=token, use_cache=False)
    return model.model if prefixed else model


@contextlib.contextmanager
def _refusing(problem: str, advice: str) -> Generator[None]:
    """Turn a library's errors, except for full memory, into CheckpointError."""
    try:
        yield
    except require("torch", "torch").OutOfMemoryError:
        raise
    except LIBRARY_ERRORS as error:
        said = str(error) or type(error).__name__
        raise CheckpointError(f"{problem}: {said}; {advice}") from error


def require_library(quantization: LibraryQuantization) -> None:
    """Import the library that a format belongs to.

    Raises:
        MissingPackageError: It is not installed.
    """
    if quantization.method == "bitsandbytes":
        with importing_bitsandbytes():
            require("bitsandbytes", "quantize")
    else:
        require("compressed_tensors", "quantize")


def _check_tensors(spec: ModelSpec, headers: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor is there, and the shapes of unquantized ones.

    Only projections are quantized: libraries would take the codes of others for values.
    """
    for name, shape in spec.tensor_shapes().items():
        info = find_tensor(headers, name)
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
        if info.dtype not in DTYPES and not name.endswith(MATRIX):
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should be {', '.join(DTYPES)}, found {info.dtype}"
            )


def _check_modules(
    spec: ModelSpec,
    quantization: LibraryQuantization,
    headers: Mapping[str, TensorInfo],
    model: Any,
) -> None:
    """Check that the library takes those matrices for quantized that are.

    It goes by lists of names in config.json, and would quantize others itself.
    """
    linear = require("torch", "torch").nn.Linear
    lists = {"bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "targets and ignore"}
    for path, module in model.named_modules():
        if not isinstance(module, linear):
            continue
        info = find_tensor(headers, f"{path.removeprefix('model.')}.weight")
        taken = type(module) is not linear or hasattr(module, "quantization_scheme")
        if info is not None and taken == (info.dtype in DTYPES):
            raise CheckpointError(
                f"{info.file}: tensor {info.name} is {info.dtype}, but by {CONFIG}'s "
                f"quantization_config ({lists[quantization.method]}) it is "
                f"{'quantized' if taken else 'not quantized'}: correct these names"
            )


def _prefixed_model(transformers: Any) -> Any:
    """A class with a Qwen3Model as `model`, like transformers' classes with a head, but no head."""
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
def no_loading_bar() -> Generator[None]:
    """Hide transformers' progress bar during loading."""
    logging = require("transformers", "torch").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Silence progress bars and warnings, such as that on the unused head; errors still raise."""
    logging = require("transformers", "torch").utils.logging
    with _SILENCE:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            # compressed-tensors has progress bars of its own that cannot be turned off.
            with no_loading_bar(), contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.set_verbosity(level)
