"""Apply a recipe: the weights and quantized matrices that a graph is built from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.weights import Weights
from ...errors import InputError
from ...quantize.formats import TABLE, Format, matrices
from ...quantize.mse import quantize_mse
from ...quantize.recipe import STORED, Recipe
from ...quantize.rotation import RotatedHeads, RotatedWeights
from ...quantize.rtn import quantize_rtn
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...quantize.smoothquant import balanced
from ...quantize.source import WeightSource
from ...quantize.stored import StoredWeights
from ..calibration.gptq_awq import quantize_layers, scale_layers
from ..graph.initializers import QuantizedMatrices

# Matrices are quantized in ranges of rows: a table of 150,000 is never whole in memory in fp32.
CHUNK_VALUES = 16 << 20
Quantize = Callable[[np.ndarray, QuantScheme], QuantizedTensor]


def apply_recipe(
    weights: Weights,
    recipe: Recipe,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> tuple[WeightSource, QuantizedMatrices]:
    """Apply a recipe to a checkpoint.

    Args:
        weights: The checkpoint.
        recipe: How to quantize.
        formats: The recipe's formats, parsed.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept, if the recipe is calibrated: see `kept_layers`.
        advance: Called after each layer, if the recipe is calibrated; twice a layer if channels are
            scaled and errors compensated.

    Returns:
        (the weights that are not quantized, the quantized matrices).
    """
    source = rotated(weights, recipe)
    if recipe.balance:
        source = balanced(source)
    read_quantized: Callable[[str], QuantizedTensor] | None = None
    if recipe.is_calibrated:
        source, read_quantized = calibrate(
            weights, source, recipe.algorithm, formats, rows, folder, advance
        )
    if recipe.algorithm == STORED:
        projections = {name: format for name, format in formats.items() if name != TABLE}
        read_quantized = _stored(weights, projections)
    # The table has no input activations to calibrate with.
    quantize: Quantize = quantize_rtn if recipe.algorithm == "rtn" else quantize_mse

    def quantize_matrix(name: str) -> QuantizedTensor:
        if read_quantized is not None and name != TABLE:
            return read_quantized(name)
        return quantize_rows(source, name, formats[name].scheme, quantize)

    return source, QuantizedMatrices(quantize_matrix)


def calibrate(
    weights: Weights,
    source: WeightSource,
    algorithm: str,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
    dtype: np.dtype | None = None,
) -> tuple[WeightSource, Callable[[str], QuantizedTensor]]:
    """Run calibration texts: scale channels, then round, each as the algorithm says.

    Args:
        weights: The checkpoint, for its identity.
        source: The weights to quantize: the checkpoint's, or transformed ones.
        algorithm: A calibrated algorithm of `recipe.ALGORITHMS`.
        formats: The matrices' formats.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept: see `kept_layers`.
        advance: Called after each layer; twice a layer if channels are scaled and errors
            compensated.
        dtype: Scaled norms are representable in this dtype; None for float32.

    Returns:
        (the weights that are not quantized, a function from a projection's name to its codes).
    """
    recipe = Recipe({}, algorithm)
    projections = {name: format for name, format in formats.items() if name != TABLE}
    importance: Callable[[str], np.ndarray] | None = None
    if recipe.scales:
        folded, importance = scale_layers(
            weights, source, projections, rows, folder / "factors", advance
        )
        source = folded if dtype is None else folded.rounded(dtype)
    if recipe.compensation is not None:
        return source, quantize_layers(
            weights,
            source,
            projections,
            rows,
            folder / "codes",
            advance,
            table=formats.get(TABLE),
            follows=recipe.compensation == "gptaq",
        )
    assert importance is not None

    def in_ranges(name: str) -> QuantizedTensor:
        rounding = partial(quantize_mse, importance=importance(name))
        return quantize_rows(source, name, formats[name].scheme, rounding)

    return source, in_ranges


def stored_recipe(weights: StoredWeights, plan: Recipe) -> Recipe:
    """A recipe with a quantized checkpoint's own codes, and the plan's format for the table.

    Projections that the checkpoint left in floating point are not quantized here either.
    """
    table = {name: text for name, text in plan.formats.items() if name == TABLE}
    projections = {*matrices(weights.spec)}
    stored = {
        name: str(Format(scheme)) for name, scheme in weights.schemes.items() if name in projections
    }
    return Recipe(table | stored, STORED, arithmetic=plan.arithmetic)


def _stored(weights: Weights, formats: Mapping[str, Format]) -> Callable[[str], QuantizedTensor]:
    if not isinstance(weights, StoredWeights):
        raise InputError(
            f"the recipe takes a quantized checkpoint's codes, but {weights.spec.source.id} is not "
            "quantized; give the checkpoint that the recipe was made for"
        )
    for name, format in formats.items():
        if format.activations or weights.schemes.get(name) != format.scheme:
            raise InputError(
                f"the recipe takes {name} in {format} from the checkpoint, but "
                f"{weights.spec.source.id} does not store it in this format"
            )
    return weights.read_quantized


def rotated(weights: Weights, recipe: Recipe) -> WeightSource:
    """The checkpoint's weights, rotated as the recipe says."""
    if recipe.rotate:
        return RotatedWeights(weights, recipe.seed)
    return RotatedHeads.seeded(weights, recipe.seed) if recipe.rotate_heads else weights


def quantize_rows(
    source: WeightSource, name: str, scheme: QuantScheme, quantize: Quantize
) -> QuantizedTensor:
    """Quantize a matrix, one range of rows at a time."""
    shape = source.spec.tensor_shapes()[f"{name}.weight"]
    step = max(1, CHUNK_VALUES // math.prod(shape[1:]))
    ranges = [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
    parts = [quantize(source.read_fp32(f"{name}.weight", rows), scheme) for rows in ranges]
    if len(parts) == 1:
        return parts[0]
    return QuantizedTensor(
        scheme,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zero_points for part in parts]),
    )


def describe_calibration(
    rows: Sequence[np.ndarray], calibration: str | Path | None
) -> dict[str, Any]:
    """The manifest's record of the calibration texts: their hash, not the texts.

    Args:
        rows: Token ids, int64 [tokens] each.
        calibration: The texts' file; None for the built-in texts.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row)).tobytes())
        digest.update(np.ascontiguousarray(row, np.int64).tobytes())
    return {
        "source": Path(calibration).name if calibration else "built-in",
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "sha256": digest.hexdigest(),
    }
