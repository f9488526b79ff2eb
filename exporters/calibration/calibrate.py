"""Quantize projections with calibration texts: scale channels, round, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ...checkpoint.weights import Weights
from ...quantize.formats import TABLE, Format
from ...quantize.mse import quantize_mse
from ...quantize.recipe import Recipe
from ...quantize.schemes import QuantizedTensor
from ...quantize.source import WeightSource, quantize_rows
from .gptq_awq import quantize_layers, scale_layers


def calibrate(
    weights: Weights,
    source: WeightSource,
    algorithm: str,
    formats: Mapping[str, Format],
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None],
    dtype: np.dtype | None = None,
    device: str = "cpu",
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
        device: Where texts run and matrices are rounded, "cpu" or "cuda".

    Returns:
        (the weights that are not quantized, a function from a projection's name to its codes).
    """
    recipe = Recipe({}, algorithm)
    projections = {name: format for name, format in formats.items() if name != TABLE}
    importance: Callable[[str], np.ndarray] | None = None
    if recipe.scaling is not None:
        folded, importance = scale_layers(
            weights,
            source,
            projections,
            rows,
            folder / "factors",
            advance,
            scaling=recipe.scaling,
            device=device,
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
            device=device,
        )
    assert importance is not None

    def in_ranges(name: str) -> QuantizedTensor:
        rounding = partial(quantize_mse, importance=importance(name))
        return quantize_rows(source, name, formats[name].scheme, rounding)

    return source, in_ranges
