"""A recipe carried out: where a graph's weights and quantized matrices come from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...quantize.balance import balanced
from ...quantize.hqq import quantize_hqq
from ...quantize.rotation import RotatedWeights
from ...quantize.rtn import quantize_rtn
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...quantize.source import WeightSource
from ...quantize.stored import StoredWeights
from ...weights import Weights
from .calibrated import quantize_layers, scale_layers
from .formats import TABLE, Format, matrices
from .quantized import QuantizedMatrices
from .recipe import STORED, Recipe

# Rows are quantized by themselves: a table of 150,000 never stands in memory in fp32.
CHUNK_VALUES = 16 << 20
Quantize = Callable[[np.ndarray, QuantScheme], QuantizedTensor]


def carry_out(
    weights: Weights,
    recipe: Recipe,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
) -> tuple[WeightSource, QuantizedMatrices]:
    """What a quantized graph is made from.

    Args:
        weights: The checkpoint.
        recipe: How to quantize.
        formats: The recipe's formats.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        folder: Where finished layers are kept, for "gptq" and "awq": see `kept_layers`.
        advance: Called after each layer, for "gptq" and "awq".

    Returns:
        (the weights that are not quantized, the quantized matrices).
    """
    source = rotated(weights, rotate=recipe.rotate, seed=recipe.seed)
    if recipe.balance:
        source = balanced(source)
    # A table has no inputs to calibrate on: the best for it is the better rounding.
    quantize: Quantize = quantize_rtn if recipe.algorithm == "rtn" else quantize_hqq
    found: Callable[[str], QuantizedTensor] | None = None
    importance: Callable[[str], np.ndarray] | None = None
    projections = {name: each for name, each in formats.items() if name != TABLE}
    if recipe.algorithm == "awq":
        source, importance = scale_layers(weights, source, projections, rows, folder, advance)
    if recipe.algorithm == "gptq":
        found = quantize_layers(weights, source, projections, rows, folder, advance)
    if recipe.algorithm == STORED:
        found = _stored(weights, projections)

    def find(name: str) -> QuantizedTensor:
        if found is not None and name != TABLE:
            return found(name)
        rounding = quantize
        if importance is not None and name != TABLE:
            rounding = partial(quantize_hqq, importance=importance(name))
        return quantize_rows(source, name, formats[name].scheme, rounding)

    return source, QuantizedMatrices(find)


def stored_recipe(weights: StoredWeights, plan: Recipe) -> Recipe:
    """The recipe that takes a quantized checkpoint's codes, and a plan's format of the table.

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
            f"the recipe takes a quantized checkpoint's codes, and {weights.spec.source.id} is not "
            "quantized; give the checkpoint that the recipe was made for"
        )
    for name, each in formats.items():
        if each.activations or weights.schemes.get(name) != each.scheme:
            raise InputError(
                f"the recipe takes {name} in {each} from the checkpoint, and "
                f"{weights.spec.source.id} does not have it so"
            )
    return weights.read_quantized


def rotated(weights: Weights, *, rotate: bool, seed: int = 0) -> WeightSource:
    """The checkpoint's weights, rotated if that is asked for."""
    return RotatedWeights(weights, seed) if rotate else weights


def quantize_rows(
    source: WeightSource, name: str, scheme: QuantScheme, quantize: Quantize
) -> QuantizedTensor:
    """Quantize a matrix a range of rows at a time."""
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
    """What a manifest says of the calibration texts: their hash, and none of them.

    Args:
        rows: Token ids, int64 [tokens] each.
        calibration: Their file; None for the built-in ones.
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
