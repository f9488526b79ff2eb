"""GPTQ and AWQ layer by layer, on onnxruntime's operators in fp32.

For GPTQ each layer's inputs are what the quantized layers before it give, so that it makes good for
them.
Memory holds one layer, its Hessians, and the texts' hidden states (tokens x hidden_size x 4 bytes).
A finished layer is written down: a run that is interrupted takes it from there. GPTQ writes the
states behind it too and goes on from these; AWQ, whose inputs are the fp32 model's, runs the texts
through the layers again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ...errors import CheckpointError, InputError
from ...files import written
from ...leftovers import lock
from ...quantize.awq import search_factors
from ...quantize.fold import MAKERS, READERS, FoldedWeights, narrow, widen
from ...quantize.gptq import quantize_gptq
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...quantize.source import WeightSource
from ...spec import ModelSpec
from ...version import __version__
from ...weights import Weights
from .formats import Format, matrices
from .graph import Design
from .layerwise import Layer, embed_rows, run_layer
from .ort_dialect import OrtDialect
from .precision import PRECISIONS
from .quantized import QuantizedMatrices

REQUEST = "request.txt"
LAYERS, STATES = "layer-*.safetensors", "states-*.safetensors"
# Tokens of which AWQ judges.
SAMPLE = 512
PARTS = ("codes", "scales", "zero_points")


@contextlib.contextmanager
def kept_layers(output: Path, *, used: bool) -> Generator[Path]:
    """The folder beside an artifact where finished layers are kept, held until the block ends.

    It is deleted when the block ends without an error; after one, the next run goes on there.

    Args:
        output: The artifact's final place.
        used: Whether layers will be kept. Otherwise only what an earlier run left is deleted.

    Raises:
        InputError: Another process holds it, or it cannot be made.
    """
    folder = output.with_name(f".{output.name}.layers")
    try:
        if used:
            folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder) if folder.is_dir() else None
    except BlockingIOError:
        if used:
            raise InputError(
                f"{folder} should be this run's alone, and another one that makes {output.name} "
                "holds it: wait for it to end, or choose another place"
            ) from None
        held = None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error
    ours = used or held is not None
    try:
        yield folder
        if ours:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        # An empty one is nothing to go on from.
        with contextlib.suppress(OSError):
            if ours:
                folder.rmdir()
        if held is not None:
            os.close(held)


class CalibratedMatrices:
    """Matrices quantized by GPTQ, a file a layer.

    Args:
        folder: Where `quantize_layers` wrote them.
        schemes: Matrix to how it is quantized.
    """

    def __init__(self, folder: Path, schemes: Mapping[str, QuantScheme]) -> None:
        self._folder = folder
        self._schemes = schemes

    def __call__(self, name: str) -> QuantizedTensor:
        """A matrix, read from its layer's file."""
        stored = load_file(_layer_file(self._folder, int(name.split(".")[1])))
        parts = (stored[f"{name}.{part}"] for part in PARTS)
        return QuantizedTensor(self._schemes[name], *parts)


def quantize_layers(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> CalibratedMatrices:
    """Quantize a model's projections by GPTQ.

    Args:
        weights: The checkpoint, for its identity.
        source: The weights that are quantized: the checkpoint's, or transformed.
        formats: Of the projections; the embedding table is none of them.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept: see `kept_layers`.
        advance: Called after each layer.

    Raises:
        CheckpointError: An activation is not finite, or a Hessian cannot be inverted.
        InputError: A layer cannot be written.
    """
    _prepare(folder, _request(weights, source, formats, rows))
    schemes = {name: each.scheme for name, each in formats.items()}
    found = CalibratedMatrices(folder, schemes)
    fp32 = Design(source, OrtDialect(), PRECISIONS["fp32"])
    precision = replace(PRECISIONS["fp32"], formats=formats)
    quantized = replace(fp32, precision=precision, matrices=QuantizedMatrices(found))
    finished = sorted(folder.glob(STATES))
    if finished:
        stored = load_file(finished[-1])
        states = [stored[str(i)] for i in range(len(rows))]
        first = int(finished[-1].stem.partition("-")[2]) + 1
    else:
        states, first = embed_rows(source, rows), 0
        _check_finite(source, "embed_tokens gives", states)
    for _ in range(first):
        advance()
    for number in range(first, source.spec.num_layers):
        file, after = _layer_file(folder, number), folder / f"states-{number:03}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        with Layer(fp32, number, folder) as layer:
            for names, hessian in _hessians(layer, rows, states):
                for name in names:
                    if name not in schemes:
                        continue
                    tensor = _quantize(source, name, hessian, schemes[name])
                    for part in PARTS:
                        tensors[f"{name}.{part}"] = getattr(tensor, part)
        _save(tensors, file)
        with Layer(quantized, number, folder) as layer:
            run_layer(layer, rows, states)
        _check_finite(source, f"layer {number} gives", states)
        _save({str(i): state for i, state in enumerate(states)}, after)
        (folder / f"states-{number - 1:03}.safetensors").unlink(missing_ok=True)
        advance()
    return found


def scale_layers(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> tuple[FoldedWeights, Callable[[str], np.ndarray]]:
    """Find AWQ's factors; arguments as for `quantize_layers`.

    Returns:
        (the weights with the factors folded in; a quantized projection to the mean square of each
        of its inputs behind them, float32 [in]).

    Raises:
        CheckpointError: An activation is not finite.
        InputError: A layer cannot be written.
    """
    # Names what a layer's file holds: one of another kind is not taken over.
    _prepare(folder, _request(weights, source, formats, rows) + " awq factors squares, spread")
    design = Design(source, OrtDialect(), PRECISIONS["fp32"])
    states = embed_rows(source, rows)
    _check_finite(source, "embed_tokens gives", states)
    factors: dict[tuple[str, str], np.ndarray] = {}
    squares: dict[tuple[str, str], np.ndarray] = {}
    for number in range(source.spec.num_layers):
        file, prefix = _layer_file(folder, number), f"layers.{number}"
        finished = file.is_file()
        with Layer(design, number, folder) as layer:
            samples = {} if finished else _samples(layer, rows, states)
            run_layer(layer, rows, states)
        for name, inputs in samples.items():
            _check_finite(source, f"{name} takes", [inputs])
        _check_finite(source, f"layer {number} gives", states)
        if not finished:
            stored = {}
            for maker, readers in READERS.items():
                names = [f"{prefix}.{reader}" for reader in readers]
                quantized = [name for name in names if name in formats]
                if quantized:
                    inputs = samples[names[0]]
                    stored[f"{maker}.factors"] = _search(source, quantized, inputs, formats)
                    stored[f"{maker}.squares"] = np.square(inputs).mean(axis=0)
            _save(stored, file)
        for name, values in load_file(file).items():
            maker, _, kind = name.rpartition(".")
            (factors if kind == "factors" else squares)[prefix, maker] = values
        advance()

    def find(layer: str, maker: str) -> np.ndarray:
        # A tensor that no quantized matrix reads stays as it is.
        shape = source.spec.tensor_shapes()[f"{layer}.{maker}.weight"]
        return factors.get((layer, maker), np.ones(shape[0], np.float32))

    def importance(name: str) -> np.ndarray:
        layer, number, part = name.split(".", 2)
        key = f"{layer}.{number}", MAKERS[part]
        return squares[key] / widen(source.spec, part, factors[key]) ** 2

    return FoldedWeights(source, find), importance


def _check_finite(source: WeightSource, what: str, values: Iterable[np.ndarray]) -> None:
    if not all(np.isfinite(each).all() for each in values):
        raise CheckpointError(
            f"{source.spec.source.folder}: {what} NaN or infinity on the calibration texts; the "
            "checkpoint is damaged, download it again"
        )


def _quantize(
    source: WeightSource, name: str, hessian: np.ndarray, scheme: QuantScheme
) -> QuantizedTensor:
    try:
        return quantize_gptq(source.read_fp32(f"{name}.weight"), hessian, scheme)
    except CheckpointError as error:
        raise CheckpointError(f"{source.spec.source.folder}: {name}: {error}") from error


def _samples(
    layer: Layer, rows: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Projection to some of its inputs, spread over all texts: float32 [tokens, in]."""
    found: list[list[np.ndarray]] = [[] for _ in layer.inputs]
    step, first = max(1, sum(map(len, rows)) // SAMPLE), 0
    for ids, state in zip(rows, states, strict=True):
        for kept, x in zip(found, layer.run_inputs(ids, state), strict=True):
            kept.append(x[first::step])
        # The steps go on from text to text: begun anew, they would take every text's first token.
        first = (first - len(ids)) % step
    return {
        name: np.concatenate(kept)
        for names, kept in zip(layer.inputs, found, strict=True)
        for name in names
    }


def _search(
    source: WeightSource, names: list[str], inputs: np.ndarray, formats: Mapping[str, Format]
) -> np.ndarray:
    """The factors of one tensor's channels, as its maker has them."""
    matrices = [source.read_fp32(f"{name}.weight") for name in names]
    schemes = [formats[name].scheme for name in names]
    reader = names[0].split(".", 2)[2]
    return narrow(source.spec, reader, search_factors(matrices, inputs, schemes))


def _hessians(
    layer: Layer, rows: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> list[tuple[list[str], np.ndarray]]:
    """(projections, mean of x x^T over all tokens) for each input that they share."""
    sums: dict[int, np.ndarray] = {}
    for ids, state in zip(rows, states, strict=True):
        for i, x in enumerate(layer.run_inputs(ids, state)):
            product = x.T @ x
            # In place: at 12,288 inputs it takes 0.6 GB.
            sums[i] = np.add(sums[i], product, out=sums[i]) if i in sums else product
    for each in sums.values():
        each /= sum(map(len, rows))
    return [(names, sums[i]) for i, names in enumerate(layer.inputs)]


def kept_bytes(spec: ModelSpec, rows: Sequence[np.ndarray]) -> int:
    """What `quantize_layers` keeps in its folder: codes of a byte each, and two layers' states."""
    codes = sum(math.prod(spec.tensor_shapes()[f"{name}.weight"]) for name in matrices(spec))
    return codes + 2 * 4 * spec.hidden_size * sum(map(len, rows))


def _layer_file(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:03}.safetensors"


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write so that a reader finds a whole file or none.

    Raises:
        InputError: It cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written: {error}; the same command goes on from the layers in "
            f"{path.parent}, which may be deleted"
        ) from error


def _request(
    weights: Weights,
    source: WeightSource,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
) -> str:
    """A hash of all that decides the result."""
    digest = hashlib.sha256(f"{__version__}\n".encode())
    for path in weights.files:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    # A transformation shows in what it makes of the norms and of one matrix.
    for name in ("norm.weight", "layers.0.input_layernorm.weight", "layers.0.mlp.up_proj.weight"):
        digest.update(source.read_fp32(name).tobytes())
    digest.update(json.dumps({name: repr(each) for name, each in formats.items()}).encode())
    for row in rows:
        digest.update(np.ascontiguousarray(row, np.int64).tobytes() + b"\n")
    return digest.hexdigest()


def _prepare(folder: Path, request: str) -> None:
    """Keep the layers of the same request that a run goes on from, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / REQUEST
    kept: set[Path] = set()
    # One that cannot be read is another request.
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
