"""Apply a recipe: the weights and quantized matrices that a graph is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...checkpoint.weights import Weights
from ...errors import InputError
from ...quantize.formats import TABLE, Format, matrices
from ...quantize.mse import quantize_mse
from ...quantize.recipe import STORED, Recipe
from ...quantize.rotation import RotatedHeads, RotatedWeights
from ...quantize.rtn import quantize_rtn
from ...quantize.schemes import QuantizedTensor
from ...quantize.smoothquant import balanced
from ...quantize.source import Quantize, WeightSource, quantize_rows
from ...quantize.stored import StoredWeights
from ..calibration.calibrate import calibrate
from ..graph.initializers import QuantizedMatrices


def apply_recipe(
    weights: Weights,
    recipe: Recipe,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
    device: str = "cpu",
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
        device: Where a calibrated recipe runs the texts and rounds, "cpu" or "cuda".

    Returns:
        (the weights that are not quantized, the quantized matrices).
    """
    source = rotated(weights, recipe)
    if recipe.balance:
        source = balanced(source)
    read_quantized: Callable[[str], QuantizedTensor] | None = None
    if recipe.is_calibrated:
        source, read_quantized = calibrate(
            weights, source, recipe.algorithm, formats, rows, folder, advance, device=device
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
