"""SmoothQuant: move outlier channels from activations into weights.

SmoothQuant (arXiv:2211.10438, eq. 4 at alpha 0.5) divides each activation channel by
sqrt(largest activation / largest weight), and multiplies the weights that read it by the same.
Activations are measured on calibration texts, or, in `balanced`, estimated from the weights: after
an RMSNorm a channel is about as large as the norm's gain; after a projection, about as large as the
projection's row. Then nothing has to be run, and a channel that the weights make large is found
even if no text shows it.
"""

from __future__ import annotations

import numpy as np

from .fold import CONSUMERS, PRODUCERS, FoldedWeights, reduce_kv
from .source import WeightSource


def balanced(source: WeightSource) -> FoldedWeights:
    """Fold the smoothing factors into a source's weights."""
    cache: dict[tuple[str, str], np.ndarray] = {}

    def factors(layer: str, producer: str) -> np.ndarray:
        key = (layer, producer)
        if key not in cache:
            cache[key] = smoothing_factors(
                _activations(source, layer, producer), _largest_weights(source, layer, producer)
            )
        return cache[key]

    return FoldedWeights(source, factors)


def _activations(source: WeightSource, layer: str, producer: str) -> np.ndarray:
    """Estimate the magnitude of each output channel of a norm or projection: float32 [channels]."""
    values = source.read_fp32(f"{layer}.{producer}.weight")
    if values.ndim == 1:
        return np.abs(values)
    gains = source.read_fp32(f"{layer}.{PRODUCERS[producer]}.weight")
    sizes = np.linalg.norm(values * gains, axis=1)
    if producer == "mlp.up_proj":
        gate = source.read_fp32(f"{layer}.mlp.gate_proj.weight")
        sizes = sizes * np.linalg.norm(gate * gains, axis=1)
    return sizes


def _largest_weights(source: WeightSource, layer: str, producer: str) -> np.ndarray:
    """The largest magnitude among the weights that read each channel: float32 [channels]."""
    largest = [
        reduce_kv(
            source.spec,
            consumer,
            np.abs(source.read_fp32(f"{layer}.{consumer}.weight")).max(axis=0),
        )
        for consumer in CONSUMERS[producer]
    ]
    return np.max(largest, axis=0)


def smoothing_factors(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sqrt(activation / weight), scaled to a geometric mean of 1; 1 for unused channels.

    Args:
        activations: Each channel's largest magnitude, float32 [channels].
        weights: The largest magnitude of the weights that read it, float32 [channels].
    """
    used = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations)
    factors[used] = np.sqrt(activations[used] / weights[used])
    if used.any():
        factors[used] /= np.exp(np.log(factors[used]).mean())
    return factors
