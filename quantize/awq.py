"""AWQ: scale up channels with large inputs, so that they are rounded in finer steps.

Lin et al., arXiv:2306.00978. A channel's factor is its mean absolute input to the power alpha. One
alpha, searched over a grid, serves all matrices that read the same tensor: the one that changes
their products least. Groups' ranges are clipped if that lowers the squared error, weighted by each
channel's mean squared input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .mse import quantize_mse
from .schemes import QuantScheme

ALPHAS = np.linspace(0, 1, 11)
# Number of output rows, about, on which an alpha is judged.
ROWS = 512


def search_factors(
    weights: Sequence[np.ndarray], inputs: np.ndarray, schemes: Sequence[QuantScheme]
) -> np.ndarray:
    """Search each channel's factor: multiplies the weights, divides the inputs.

    Args:
        weights: float32 [out, in] each; all read the same inputs.
        inputs: float32 [tokens, in], a sample.
        schemes: Each matrix's quantization scheme.

    Returns:
        float32 [in], around 1; all 1 if no alpha helps.
    """
    magnitudes = np.maximum(np.abs(inputs).mean(axis=0), 1e-6)
    squares = np.square(inputs).mean(axis=0)
    best, least = np.ones_like(magnitudes), np.inf
    samples = [weight[:: max(1, len(weight) // ROWS)] for weight in weights]
    for alpha in ALPHAS:
        factors = magnitudes**alpha
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        error = 0.0
        for weight, scheme in zip(samples, schemes, strict=True):
            scaled = quantize_mse(weight * factors, scheme, squares / factors**2)
            rounded = scaled.dequantize() / factors
            error += float((((rounded - weight) @ inputs.T) ** 2).sum())
        if error < least:
            best, least = factors, error
    return best
