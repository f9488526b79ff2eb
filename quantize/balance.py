"""Outlier channels moved from activations into weights, judged by the weights alone.

SmoothQuant (arXiv:2211.10438, eq. 4 at alpha 0.5) divides each channel of an activation by
sqrt(largest activation / largest weight) and multiplies the weights that read it. It takes the
activations from calibration. Here they are estimated: behind an RMSNorm a channel is about as large
as the norm's gain, and behind a projection about as large as the projection's row. So nothing has
to be run, and a channel that the weights make large is found whether or not a text shows it.
"""

from __future__ import annotations

import numpy as np

from .fold import MAKERS, READERS, FoldedWeights, narrow
from .source import WeightSource


def balanced(source: WeightSource) -> FoldedWeights:
    """A source whose activations have no outlier channels that its weights show."""
    known: dict[tuple[str, str], np.ndarray] = {}

    def factors(layer: str, maker: str) -> np.ndarray:
        key = (layer, maker)
        if key not in known:
            known[key] = _balance(
                _activations(source, layer, maker), _largest_weights(source, layer, maker)
            )
        return known[key]

    return FoldedWeights(source, factors)


def _activations(source: WeightSource, layer: str, maker: str) -> np.ndarray:
    """About how large each channel is that a norm or projection makes: float32 [channels]."""
    values = source.read_fp32(f"{layer}.{maker}.weight")
    if values.ndim == 1:
        return np.abs(values)
    gains = source.read_fp32(f"{layer}.{MAKERS[maker]}.weight")
    sizes = np.linalg.norm(values * gains, axis=1)
    if maker == "mlp.up_proj":
        gate = source.read_fp32(f"{layer}.mlp.gate_proj.weight")
        sizes = sizes * np.linalg.norm(gate * gains, axis=1)
    return sizes


def _largest_weights(source: WeightSource, layer: str, maker: str) -> np.ndarray:
    """The largest weight that reads each channel: float32 [channels]."""
    largest = [
        narrow(
            source.spec, reader, np.abs(source.read_fp32(f"{layer}.{reader}.weight")).max(axis=0)
        )
        for reader in READERS[maker]
    ]
    return np.max(largest, axis=0)


def _balance(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Square root of activation by weight, around 1; 1 where a channel is not used."""
    used = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations)
    factors[used] = np.sqrt(activations[used] / weights[used])
    if used.any():
        factors[used] /= np.exp(np.log(factors[used]).mean())
    return factors
