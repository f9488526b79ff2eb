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
    inputs: Sequence[np.ndarray], last: int, originals: Sequence[np.ndarray] | None = None
) -> Moments:
    """Measure the moments of inputs.

    Args:
        inputs: float32 [tokens, in] for each text.
        last: How often a text's last token counts.
        originals: The original model's inputs, likewise; for `cross`.
    """
    size = inputs[0].shape[1]
    hessian = np.zeros((size, size), np.float32)
    cross = None if originals is None else np.zeros_like(hessian)
    for texts in _blocks(inputs):
        roots = [np.ones((len(inputs[i]), 1), np.float32) for i in texts]
        for root in roots:
            root[-1] = np.sqrt(last)
        weights = np.concatenate(roots)
        y = np.concatenate([inputs[i] for i in texts]) * weights
        # numpy computes half of a product with its own transpose.
        hessian += y.T @ y
        if originals is not None:
            x = np.concatenate([originals[i] for i in texts]) * weights
            cross += (x - y).T @ y
    count = sum(len(text) + last - 1 for text in inputs)
    return Moments(hessian / count, None if cross is None else cross / count)


def _blocks(inputs: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Numbers of texts, in blocks of about `BLOCK` tokens."""
    block, tokens = [], 0
    for i, text in enumerate(inputs):
        block.append(i)
        tokens += len(text)
        if tokens >= BLOCK or i == len(inputs) - 1:
            yield block
            block, tokens = [], 0
