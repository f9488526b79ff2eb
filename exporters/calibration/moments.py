"""Second moments of a projection's inputs over the calibration texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Tokens in one product: a Hessian of 12,288 inputs takes 0.6 GB, and each product adds to all of
# it. Texts of a hundred tokens each would take longer for the sums than for the products.
BLOCK = 2048


class Moments(NamedTuple):
    """Means over tokens.

    Attributes:
        hessian: mean y y^T, float32 [in, in], for the quantized model's inputs y.
        cross: mean (x - y) y^T, float32 [in, in], for the original model's inputs x; or None.
    """

    hessian: np.ndarray
    cross: np.ndarray | None


def measure_moments(
    inputs: Sequence[np.ndarray], originals: Sequence[np.ndarray], last: int
) -> Moments:
    """Measure the moments of inputs.

    Args:
        inputs: The quantized model's inputs y, float32 [tokens, in] for each text.
        originals: The original model's inputs x, likewise, for `cross`; or none.
        last: How often a text's last token counts.
    """
    size = inputs[0].shape[1]
    hessian = np.zeros((size, size), np.float32)
    cross = np.zeros_like(hessian) if originals else None
    total = 0.0
    for texts in blocks(inputs, BLOCK):
        weights = token_weights([inputs[i] for i in texts], last)
        total += float((weights**2).sum())
        y = np.concatenate([inputs[i] for i in texts]) * weights
        # numpy computes half of a matrix's product with its own transpose.
        hessian += y.T @ y
        if cross is not None:
            x = np.concatenate([originals[i] for i in texts]) * weights
            cross += (x - y).T @ y
    hessian /= total
    if cross is not None:
        cross /= total
    return Moments(hessian, cross)


def token_weights(texts: Sequence[np.ndarray], last: int) -> np.ndarray:
    """The root of each token's count: float32 [tokens, 1]."""
    weights = np.ones((sum(map(len, texts)), 1), np.float32)
    weights[np.cumsum([len(text) for text in texts]) - 1] = np.sqrt(last)
    return weights


def blocks(texts: Sequence[np.ndarray], size: int) -> Iterator[list[int]]:
    """Numbers of texts, in blocks of about `size` tokens."""
    block: list[int] = []
    tokens = 0
    for i, text in enumerate(texts):
        block.append(i)
        tokens += len(text)
        if tokens >= size or i == len(texts) - 1:
            yield block
            block, tokens = [], 0
