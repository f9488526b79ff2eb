"""AWQ: channels with large inputs get finer steps, by a factor that is searched.

Lin et al., arXiv:2306.00978. The factor of a channel is its mean input to the power of alpha; alpha
is the one, for all matrices that read the same tensor, whose products change least. The ranges of
groups are clipped where that leaves less error in the products, each channel's counted by its mean
squared input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .hqq import quantize_hqq
from .schemes import QuantScheme

ALPHAS = np.linspace(0, 1, 11)
# Output rows on which an alpha is judged.
ROWS = 512


def search_factors(
    weights: Sequence[np.ndarray], inputs: np.ndarray, schemes: Sequence[QuantScheme]
) -> np.ndarray:
    """The factors by which the inputs should be divided and the weights multiplied.

    Args:
        weights: float32 [out, in] each, all reading the same inputs.
        inputs: float32 [tokens, in], a sample.
        schemes: How each will be quantized.

    Returns:
        float32 [in], around 1; all 1 where no alpha is better than none.
    """
    magnitudes = np.maximum(np.abs(inputs).mean(axis=0), 1e-6)
    squares = np.square(inputs).mean(axis=0)
    best, least = np.ones_like(magnitudes), np.inf
    judged = [weight[:: max(1, len(weight) // ROWS)] for weight in weights]
    for alpha in ALPHAS:
        factors = magnitudes**alpha
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        error = 0.0
        for weight, scheme in zip(judged, schemes, strict=True):
            scaled = quantize_hqq(weight * factors, scheme, squares / factors**2)
            rounded = scaled.dequantize() / factors
            error += float((((rounded - weight) @ inputs.T) ** 2).sum())
        if error < least:
            best, least = factors, error
    return best
