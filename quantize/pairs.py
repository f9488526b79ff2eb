"""int8 codes whose products no CPU saturates.

x86 without VNNI multiplies uint8 activations by int8 weights with vpmaddubsw, which adds the
products of inputs 2i and 2i + 1 in 16 bits, and saturates. Activations are 255 at most, so nothing
saturates where in every output row the codes of inputs 2i and 2i + 1 sum to -128 .. 128: 255 * 128
is 32,640, and 16 bits hold 32,767. Codes of opposite signs keep to it anyway.

So a row's scale is chosen between that of its largest value and 127/64 of it, at which any pair
fits: where the squared errors of rounding and of pairs that have to shrink are least together.
"""

from __future__ import annotations

import numpy as np

LIMIT = 128
LARGEST = 127
# A row's scale by that of its largest value.
SHARES = np.linspace(1, LARGEST / 64, 21, dtype=np.float32)


def choose_shares(weight: np.ndarray) -> np.ndarray:
    """The scale of each row, by that of its largest value, that leaves the least squared error.

    A step of s errs by s^2 / 12 a value. A pair of the sum u > 128 s loses e = u - 128 s, half of
    it in each value: e^2 / 2.

    Args:
        weight: float32 [out, in].

    Returns:
        float32 [out], from 1 to 127/64.
    """
    steps = np.abs(weight).max(axis=1) / LARGEST
    sums = np.abs(_sums(weight))
    # A larger scale lets fewer pairs be too large, never others.
    rows, places = np.nonzero(sums > LIMIT * steps[:, None])
    sums = sums[rows, places]
    errors = np.empty((len(SHARES), len(weight)), np.float64)
    for found, share in zip(errors, SHARES, strict=True):
        lost = np.maximum(sums - LIMIT * share * steps[rows], 0)
        found[:] = np.bincount(rows, lost.astype(np.float64) ** 2 / 2, len(weight))
        found += weight.shape[1] * (share * steps).astype(np.float64) ** 2 / 12
    return SHARES[errors.argmin(axis=0)]


def round_pairs(values: np.ndarray) -> np.ndarray:
    """Codes near values: whole numbers, pairs within the limit.

    Args:
        values: float32 [out, in], weights in units of their row's scale; overwritten.

    Returns:
        float32 [out, in], whole numbers from -127 to 127.
    """
    np.clip(values, -LARGEST, LARGEST, out=values)
    # Below the limit by more than a rounding of this sum, rounded pairs are within it.
    rows, places = np.nonzero(np.abs(_sums(values)) > LIMIT - 0.5)
    columns = 2 * places[:, None] + np.arange(2)
    pairs = values[rows[:, None], columns]
    sums = pairs.sum(axis=1)
    excess = np.maximum(np.abs(sums) - LIMIT, 0)
    pairs -= (np.sign(sums) * excess / 2)[:, None]
    rounded = np.rint(pairs)
    # Two halves that are rounded away from zero: the one that moved farther goes back.
    signs = np.sign(sums)[:, None]
    farther = np.argmax((rounded - pairs) * signs, axis=1)
    over = np.abs(rounded.sum(axis=1)) > LIMIT
    rounded[over, farther[over]] -= signs[over, 0]
    values[rows[:, None], columns] = rounded
    return np.rint(values, out=values)


def room(partners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest code that the other code of a pair leaves.

    Args:
        partners: float32 [out], the other codes, around zero.
    """
    return np.maximum(-LARGEST, -LIMIT - partners), np.minimum(LARGEST, LIMIT - partners)


def find_excess(codes: np.ndarray) -> tuple[int, int] | None:
    """A pair of codes beyond the limit, if there is one.

    Args:
        codes: int8 [out, in], around zero.

    Returns:
        (output row, first input of the pair), or None.
    """
    even = codes.shape[1] // 2 * 2
    sums = np.add(codes[:, 0:even:2], codes[:, 1:even:2], dtype=np.int16)
    if sums.size == 0 or (sums.max() <= LIMIT and sums.min() >= -LIMIT):
        return None
    row, place = np.argwhere(np.abs(sums) > LIMIT)[0]
    return int(row), 2 * int(place)


def _sums(values: np.ndarray) -> np.ndarray:
    """Sums of inputs 2i and 2i + 1, [out, in // 2]; an odd last input has no partner."""
    even = values.shape[1] // 2 * 2
    return values[:, 0:even:2] + values[:, 1:even:2]
