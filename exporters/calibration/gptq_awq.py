"""GPTQ, GPTAQ and AWQ layer by layer, on onnxruntime's operators in fp32.

In GPTQ a matrix's inputs come from the quantized matrices before it, in its own layer too. GPTAQ
compares them with those of the original model, and compensates for the difference.
Memory holds one layer, its Hessians, and the texts' hidden states (tokens x hidden_size x 4 bytes);
in GPTAQ also the layer's original inputs.
Finished layers are saved, and an interrupted run resumes from them. GPTQ also saves the states
after a layer and continues from these; AWQ takes inputs from the fp32 model, so it runs the texts
through the layers again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from ...checkpoint.spec import ModelSpec
from ...checkpoint.weights import Weights
from ...errors import CheckpointError, InputError
from ...files import written
from ...leftovers import lock
from ...quantize.awq import search_factors
from ...quantize.fold import PRODUCERS, FoldedWeights, expand_kv, reduce_kv
from ...quantize.formats import Format, matrices
from ...quantize.mse import quantize_mse
from ...quantize.schemes import QuantizedTensor
from ...quantize.smoothquant import factors_help, largest_weights, smoothing_factors
from ...quantize.source import WeightSource
from ...version import __version__
from .engines import open_engine
from .layerwise import STAGES, embed_rows

logger = logging.getLogger(__name__)

REQUEST = "request.txt"
LAYERS, STATES = "layer-*.safetensors", "states-*.safetensors"
# How often a text's last token counts in GPTAQ, where it alone reaches the result.
LAST = 10
# Tokens that AWQ measures its factors on.
SAMPLE = 512
PARTS = ("codes", "scales", "zero_points")


@contextlib.contextmanager
def kept_layers(output: Path, *, used: bool) -> Generator[Path]:
    """Lock the folder beside an artifact where finished layers are kept, until the block ends.

    The folder is deleted if the block ends without an error, or before a layer is finished;
    otherwise the next run resumes from it, which a warning says.

    Args:
        output: The artifact's final path.
        used: Whether layers will be kept. If not, only an earlier run's leftovers are deleted.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be created.
    """
    folder = output.with_name(f".{output.name}.layers")
    try:
        if used:
            folder.mkdir(parents=True, exist_ok=True)
        lock_descriptor = lock(folder) if folder.is_dir() else None
    except BlockingIOError:
        if used:
            raise InputError(
                f"{folder} is locked by another run that writes {output.name}: wait for it to end, "
                "or choose another output"
            ) from None
        lock_descriptor = None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error
    owned = used or lock_descriptor is not None
    try:
        yield folder
        if owned:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # Ctrl-C, too
        if owned and next(folder.rglob(LAYERS), None) is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif used:
            logger.warning(
                "%s keeps the layers that are finished: the same command goes on from there", folder
            )
        raise
    finally:
        if lock_descriptor is not None:
            os.close(lock_descriptor)


def quantize_layers(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
    *,
    table: Format | None = None,
    follows: bool = True,
    device: str = "cpu",
) -> Callable[[str], QuantizedTensor]:
    """Quantize a model's projections by GPTQ or GPTAQ.

    Args:
        weights: The checkpoint, for its identity.
        source: The weights to quantize: the checkpoint's, or transformed ones.
        formats: The projections' formats, without the embedding table.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept: see `kept_layers`.
        advance: Called after each layer.
        table: The embedding table's format; None if it is not quantized.
        follows: Whether products follow those of the original model (GPTAQ), or those of the
            original matrix with the quantized layers' inputs (GPTQ).
        device: "cpu" or "cuda".

    Returns:
        A function that reads a projection's codes from its layer's file, by its name.

    Raises:
        CheckpointError: An activation is not finite, or a Hessian cannot be inverted.
        InputError: A layer cannot be written.
    """
    name = "gptaq" if follows else "gptq"
    _prepare(folder, f"{_request(weights, source, formats, rows)} {name} {table}")
    engine = open_engine(device, source, formats, folder)
    outputs = source.spec.outputs
    last = LAST if follows and (source.spec.task == "reranker" or outputs.last_token) else 1
    first, states, originals = _first_states(source, rows, folder, table, follows=follows)
    for _ in range(first):
        advance()
    for number in range(first, source.spec.num_layers):
        done: dict[str, QuantizedTensor] = {}
        inputs: list[np.ndarray] = []
        original_inputs: list[np.ndarray] = []
        for stage in range(STAGES + 1):
            if follows:
                with engine.segment(number, stage, {}) as segment:
                    original_inputs = segment.run(rows, originals, original_inputs)
            with engine.segment(number, stage, done) as segment:
                inputs = segment.run(rows, states, inputs)
                names = [name for name in segment.names if name in formats]
            if names:
                try:
                    done |= engine.quantize(names, inputs, original_inputs, last)
                except CheckpointError as error:
                    place = f"{source.spec.source.folder}: {names[0]}"
                    raise CheckpointError(f"{place}: {error}") from error
        codes = {f"{name}.{part}": getattr(done[name], part) for name in done for part in PARTS}
        _save(codes, _layer_file(folder, number))
        _check_finite(source, f"layer {number} gives", states)
        kept = {str(i): state for i, state in enumerate(states)}
        kept |= {f"original.{i}": state for i, state in enumerate(originals)}
        _save(kept, _states_file(folder, number))
        _states_file(folder, number - 1).unlink(missing_ok=True)
        advance()

    def read(name: str) -> QuantizedTensor:
        with safe_open(_layer_file(folder, int(name.split(".")[1])), framework="numpy") as file:
            parts = [file.get_tensor(f"{name}.{part}") for part in PARTS]
        return QuantizedTensor(formats[name].scheme, *parts)

    return read


def _first_states(
    source: WeightSource,
    rows: Sequence[np.ndarray],
    folder: Path,
    table: Format | None,
    *,
    follows: bool,
) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """The first layer that is not quantized yet, and the texts' states before it.

    The original model's states are the third; empty for GPTQ.
    """
    if finished := sorted(folder.glob(STATES)):
        stored = load_file(finished[-1])
        states = [stored[str(i)] for i in range(len(rows))]
        originals = [stored[f"original.{i}"] for i in range(len(rows) if follows else 0)]
        return int(finished[-1].stem.partition("-")[2]) + 1, states, originals
    states = embed_rows(source, rows)
    _check_finite(source, "embed_tokens gives", states)
    originals = list(states) if follows else []
    if table is not None:
        states = [quantize_mse(state[0], table.scheme).dequantize()[None] for state in states]
    return 0, states, originals


def scale_layers(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
    *,
    scaling: str = "awq",
    device: str = "cpu",
) -> tuple[FoldedWeights, Callable[[str], np.ndarray]]:
    """Find the channels' factors.

    Args:
        weights: The checkpoint, for its identity.
        source: The weights to scale: the checkpoint's, or transformed ones.
        formats: The projections' formats.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept: see `kept_layers`.
        advance: Called after each layer.
        scaling: "awq", for weights alone; or "smoothquant", for weights and activations in 8 bits.
        device: "cpu" or "cuda".

    Returns:
        (the weights with the factors folded in; a function from a quantized projection's name to
        the mean square of each of its scaled inputs, float32 [in]).

    Raises:
        CheckpointError: An activation is not finite.
        InputError: A layer cannot be written.
    """
    # The suffix names the files' contents: files with other contents are not reused.
    _prepare(
        folder, f"{_request(weights, source, formats, rows)} {scaling} factors squares, spread"
    )
    engine = open_engine(device, source, formats, folder)
    states = embed_rows(source, rows)
    _check_finite(source, "embed_tokens gives", states)
    factors: dict[tuple[str, str], np.ndarray] = {}
    squares: dict[tuple[str, str], np.ndarray] = {}
    for number in range(source.spec.num_layers):
        file, prefix = _layer_file(folder, number), f"layers.{number}"
        finished = file.is_file()
        stored: dict[str, np.ndarray] = {}
        inputs: list[np.ndarray] = []
        for stage in range(STAGES + 1):
            with engine.segment(number, stage, {}) as segment:
                inputs = segment.run(rows, states, inputs)
                names = [name for name in segment.names if name in formats]
            if names and not finished:
                _check_finite(source, f"{names[0]} takes", inputs)
                sample = _sample(inputs)
                producer = PRODUCERS[names[0].removeprefix(f"{prefix}.")]
                stored[f"{producer}.factors"] = _find_factors(
                    source, scaling, names, formats, inputs, sample
                )
                stored[f"{producer}.squares"] = np.square(sample).mean(axis=0)
        _check_finite(source, f"layer {number} gives", states)
        if not finished:
            _save(stored, file)
        for name, values in load_file(file).items():
            producer, _, kind = name.rpartition(".")
            (factors if kind == "factors" else squares)[prefix, producer] = values
        advance()

    def read_factors(layer: str, producer: str) -> np.ndarray:
        # A tensor that no quantized matrix reads is not scaled.
        shape = source.spec.tensor_shapes()[f"{layer}.{producer}.weight"]
        return factors.get((layer, producer), np.ones(shape[0], np.float32))

    def importance(name: str) -> np.ndarray:
        layer, number, part = name.split(".", 2)
        key = f"{layer}.{number}", PRODUCERS[part]
        return squares[key] / expand_kv(source.spec, part, factors[key]) ** 2

    return FoldedWeights(source, read_factors), importance


def _check_finite(source: WeightSource, what: str, values: Iterable[np.ndarray]) -> None:
    if not all(np.isfinite(array).all() for array in values):
        raise CheckpointError(
            f"{source.spec.source.folder}: {what} NaN or infinity on the calibration texts; the "
            "checkpoint is damaged, download it again"
        )


def _sample(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """About `SAMPLE` tokens of a projection's inputs, spread over all texts: float32 [tokens, in].

    Steps continue from text to text: restarted, they would take every text's first token.
    """
    sizes = [len(text) for text in inputs]
    chosen = np.arange(0, sum(sizes), max(1, sum(sizes) // SAMPLE))
    ends = np.cumsum(sizes)
    texts = np.searchsorted(ends, chosen, side="right")
    places = chosen - (ends - sizes)[texts]
    return np.stack([inputs[i][place] for i, place in zip(texts, places, strict=True)])


def _find_factors(
    source: WeightSource,
    scaling: str,
    names: Sequence[str],
    formats: Mapping[str, Format],
    inputs: Sequence[np.ndarray],
    sample: np.ndarray,
) -> np.ndarray:
    """A factor for each output channel of the norm or projection that the named matrices read."""
    consumer = names[0].split(".", 2)[2]
    weights = [source.read_fp32(f"{name}.weight") for name in names]
    schemes = [formats[name].scheme for name in names]
    if scaling == "awq":
        return reduce_kv(source.spec, consumer, search_factors(weights, sample, schemes))
    activations = np.max([np.abs(text).max(axis=0) for text in inputs], axis=0)
    activations = reduce_kv(source.spec, consumer, activations)
    factors = smoothing_factors(activations, largest_weights(source, names))
    if factors_help(expand_kv(source.spec, consumer, factors), weights, sample, schemes):
        return factors
    return np.ones_like(factors)


def kept_bytes(spec: ModelSpec, rows: Sequence[np.ndarray]) -> int:
    """Bytes that `quantize_layers` keeps on disk: a byte per code, and two layers' states.

    GPTAQ keeps the states of the original model too.
    """
    codes = sum(math.prod(spec.tensor_shapes()[f"{name}.weight"]) for name in matrices(spec))
    return codes + 2 * 2 * 4 * spec.hidden_size * sum(map(len, rows))


def _layer_file(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:03}.safetensors"


def _states_file(folder: Path, number: int) -> Path:
    return folder / f"states-{number:03}.safetensors"


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a file atomically.

    Raises:
        InputError: The file cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written: {error}; the same command resumes from the layers in "
            f"{path.parent}, which may be deleted"
        ) from error


def _request(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
) -> str:
    """A hash of everything that determines the result."""
    digest = hashlib.sha256(f"{__version__}\n".encode())
    for path in weights.files:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    # Every transformation of the weights changes one of these.
    for name in (
        "norm.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.self_attn.v_proj.weight",
        "layers.0.mlp.up_proj.weight",
    ):
        digest.update(source.read_fp32(name).tobytes())
    digest.update(json.dumps({name: repr(format) for name, format in formats.items()}).encode())
    for row in rows:
        digest.update(np.ascontiguousarray(row, np.int64).tobytes() + b"\n")
    return digest.hexdigest()


def _prepare(folder: Path, request: str) -> None:
    """Keep the finished layers of the same request, to resume from; delete everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / REQUEST
    kept: set[Path] = set()
    # An unreadable request counts as another request.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if state.read_text(encoding="utf-8") == request:
            kept = {state, *folder.glob(LAYERS), *sorted(folder.glob(STATES))[-1:]}
    for path in set(folder.iterdir()) - kept:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not kept:
        with written(state) as file:
            file.write(request.encode())
