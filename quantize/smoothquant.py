"""SmoothQuant: move outlier channels from activations into weights.

SmoothQuant (arXiv:2211.10438, eq. 4 at alpha 0.5) divides each activation channel by
sqrt(largest activation / largest weight), and multiplies the weights that read it by the same.
Activations are measured on calibration texts, or, in `balanced`, estimated from the weights: after
an RMSNorm a channel is about as large as the norm's gain; after a projection, about as large as the
projection's row. Then nothing has to be run, and a channel that the weights make large is found
even if no text shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from .fold import CONSUMERS, PRODUCERS, FoldedWeights, reduce_kv
from .rtn import quantize_rtn
from .schemes import QuantScheme
from .source import WeightSource

# Rows of each matrix that factors are judged by.
ROWS = 256


def balanced(source: WeightSource) -> FoldedWeights:
    """Fold the smoothing factors into a source's weights."""

    @cache
    def factors(layer: str, producer: str) -> np.ndarray:
        readers = [f"{layer}.{consumer}" for consumer in CONSUMERS[producer]]
        return smoothing_factors(
            _activations(source, layer, producer), largest_weights(source, readers)
        )

    return FoldedWeights(source, factors)


def _activations(source: WeightSource, layer: str, producer: str) -> np.ndarray:
    """Estimate the magnitude of each output channel of a norm or projection: float32 [channels]."""
    values = source.read_fp32(f"{layer}.{producer}.weight")
    if values.ndim == 1:
        return np.abs(values)
    gains = source.read_fp32(f"{layer}.{PRODUCERS[producer]}.weight")
    sizes = _norms(values * gains)
    if producer == "mlp.up_proj":
        gate = source.read_fp32(f"{layer}.mlp.gate_proj.weight")
        sizes = sizes * _norms(gate * gains)
    return sizes


def _norms(rows: np.ndarray) -> np.ndarray:
    """Euclidean norms: float32 [rows]; summed in float64, so that every CPU gives the same ones."""
    return np.sqrt(np.square(rows).sum(axis=1, dtype=np.float64)).astype(np.float32)


def largest_weights(source: WeightSource, names: Sequence[str]) -> np.ndarray:
    """The largest magnitude among the weights that read each channel: float32 [channels].

    Args:
        source: The weights.
        names: Projections that read the same tensor.
    """
    largest = np.max(
        [np.abs(source.read_fp32(f"{name}.weight")).max(axis=0) for name in names], axis=0
    )
    return reduce_kv(source.spec, names[0].split(".", 2)[2], largest)


def smoothing_factors(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sqrt(activation / weight), scaled to a geometric mean of 1; 1 for unused channels.

    Args:
        activations: Each channel's largest magnitude, float32 [channels].
        weights: The largest magnitude of the weights that read it, float32 [channels].

    Returns:
        float32 [channels], the same on every CPU.
    """
    used = (activations > 0) & (weights > 0)
    # In float32, log and exp differ by a bit between CPUs, and artifacts with them.
    factors = np.ones(activations.shape, np.float64)
    factors[used] = np.sqrt(activations[used] / weights[used])
    if used.any():
        factors[used] /= np.exp(np.log(factors[used]).mean())
    return factors.astype(np.float32)


def factors_help(
    factors: np.ndarray,
    weights: Sequence[np.ndarray],
    inputs: np.ndarray,
    schemes: Sequence[QuantScheme],
) -> bool:
    """Whether products err less with the factors, both sides rounded to nearest.

    Without outliers they do not: the factors then only move the weights' spread into activations.
    Each token's error is relative to its product: the next norm makes all tokens alike in size.

    Args:
        factors: float32 [in]: multiply the weights, divide the inputs.
        weights: float32 [out, in] each; all read the same inputs.
        inputs: float32 [tokens, in], a sample; rounded to 8 bits, one scale per token.
        schemes: Each matrix's quantization scheme.
    """
    samples = [weight[:: max(1, len(weight) // ROWS)] for weight in weights]
    exact = inputs @ np.concatenate(samples).T
    sizes = np.maximum(np.square(exact).sum(axis=1), 1e-20)

    def error(factors: np.ndarray) -> float:
        pairs = zip(samples, schemes, strict=True)
        rounded = [quantize_rtn(weight * factors, scheme).dequantize() for weight, scheme in pairs]
        x = inputs / factors
        scales = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-20) / np.float32(127)
        product = (np.rint(x / scales) * scales) @ np.concatenate(rounded).T
        return float((np.square(product - exact).sum(axis=1) / sizes).sum())

    return error(factors) < error(np.ones_like(factors))
