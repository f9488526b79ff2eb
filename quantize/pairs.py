"""Limit int8 codes in pairs, so that no CPU saturates their products.

x86 without VNNI multiplies uint8 activations by int8 weights with vpmaddubsw. It adds the products
of inputs 2i and 2i + 1 in 16 bits, with saturation. Activations are at most 255. So nothing
saturates if in every output row the codes of inputs 2i and 2i + 1 sum to -128 .. 128: 255 * 128 is
32,640, and 16 bits hold 32,767. Codes of opposite signs always satisfy this.

A row's scale is between the usual one, max|w| / 127, and 127/64 of it, at which any pair fits. It
minimizes the squared errors of rounding plus those of shrinking pairs to the limit.
"""

from __future__ import annotations

import numpy as np

LIMIT = 128
LARGEST = 127
# The scales to try for a row, relative to max|w| / 127.
SHARES = np.linspace(1, LARGEST / 64, 21, dtype=np.float32)


def choose_shares(weight: np.ndarray) -> np.ndarray:
    """Choose each row's scale, relative to max|w| / 127, for the least squared error.

    Rounding with step s has a mean squared error of s^2 / 12 per value. A pair with sum u > 128 s
    has to shrink by e = u - 128 s, half of it in each value, with a squared error of e^2 / 2.

    Args:
        weight: float32 [out, in].

    Returns:
        float32 [out], from 1 to 127/64.
    """
    steps = np.abs(weight).max(axis=1) / LARGEST
    sums = np.abs(_sums(weight))
    # These are all pairs that can exceed the limit: a larger scale only makes them fewer.
    rows, places = np.nonzero(sums > LIMIT * steps[:, None])
    sums = sums[rows, places]
    errors = np.empty((len(SHARES), len(weight)), np.float64)
    for row_errors, share in zip(errors, SHARES, strict=True):
        excess = np.maximum(sums - LIMIT * share * steps[rows], 0)
        row_errors[:] = np.bincount(rows, excess.astype(np.float64) ** 2 / 2, len(weight))
        row_errors += weight.shape[1] * (share * steps).astype(np.float64) ** 2 / 12
    return SHARES[errors.argmin(axis=0)]


def round_pairs(values: np.ndarray) -> np.ndarray:
    """Round values to codes, with all pairs within the limit.

    Args:
        values: float32 [out, in], weights in units of their row's scale; overwritten.

    Returns:
        float32 [out, in], integers from -127 to 127.
    """
    np.clip(values, -LARGEST, LARGEST, out=values)
    # A pair below LIMIT - 0.5 is safe: rounding cannot take its sum beyond LIMIT.
    rows, places = np.nonzero(np.abs(_sums(values)) > LIMIT - 0.5)
    columns = 2 * places[:, None] + np.arange(2)
    pairs = values[rows[:, None], columns]
    sums = pairs.sum(axis=1)
    excess = np.maximum(np.abs(sums) - LIMIT, 0)
    pairs -= (np.sign(sums) * excess / 2)[:, None]
    rounded = np.rint(pairs)
    # If both values were rounded away from zero, the one that moved farther goes back by one.
    signs = np.sign(sums)[:, None]
    farther = np.argmax((rounded - pairs) * signs, axis=1)
    over = np.abs(rounded.sum(axis=1)) > LIMIT
    rounded[over, farther[over]] -= signs[over, 0]
    values[rows[:, None], columns] = rounded
    return np.rint(values, out=values)


def room(partners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest code that a pair's other code allows.

    Args:
        partners: float32 [out], the pairs' other codes, around zero.
    """
    return np.maximum(-LARGEST, -LIMIT - partners), np.minimum(LARGEST, LIMIT - partners)


def find_excess(codes: np.ndarray) -> tuple[int, int] | None:
    """Find a pair of codes beyond the limit.

    Args:
        codes: int8 [out, in], around zero.

    Returns:
        (output row, first input of the pair), or None.
    """
    places = np.argwhere(np.abs(_sums(codes, np.int16)) > LIMIT)
    return (int(places[0, 0]), 2 * int(places[0, 1])) if len(places) else None


def _sums(values: np.ndarray, dtype: type | None = None) -> np.ndarray:
    """Sums of inputs 2i and 2i + 1, [out, in // 2]; an odd last input has no partner."""
    even = values.shape[1] // 2 * 2
    return np.add(values[:, 0:even:2], values[:, 1:even:2], dtype=dtype)
