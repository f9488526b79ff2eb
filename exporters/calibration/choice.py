"""Choose a level for each matrix by its size and its predicted error.

Within a size exactly, a knapsack problem; or as a list of upgrades, of which the first few are the
best choice for their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Most sizes that are told apart when formats are chosen within a size.
MOST_SIZES = 1 << 16


@dataclass(frozen=True)
class Level:
    """A format that a matrix may have: its size, and the error predicted for it."""

    format: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Upgrade:
    """A step of a matrix to its next level: the bytes it adds, and the error it removes."""

    name: str
    level: str
    bytes: int
    gain: float


def choose_within(options: Mapping[str, Sequence[Level]], room: int) -> dict[str, str]:
    """The formats with the least sum of predicted errors (a knapsack problem, solved exactly).

    Sizes are counted in units: the greatest that divides all of them, or a larger one, to which
    they are rounded up, where there would be more than `MOST_SIZES`.

    Args:
        options: The levels of each matrix, fewest bytes first.
        room: Bytes that all may take beyond their first levels.

    Returns:
        Each matrix's format.
    """
    added = {
        name: [level.bytes - levels[0].bytes for level in levels]
        for name, levels in options.items()
    }
    divisor = math.gcd(*(size for sizes in added.values() for size in sizes))
    unit = max(divisor, math.ceil(room / MOST_SIZES), 1)
    units = room // unit
    taken = {name: [math.ceil(size / unit) for size in sizes] for name, sizes in added.items()}
    # least[i] is the least error of the matrices so far within i units.
    least = np.zeros(units + 1)
    choices = {}
    for name, levels in options.items():
        errors = np.full((len(levels), units + 1), np.inf)
        for row, level, size in zip(errors, levels, taken[name], strict=True):
            if size <= units:
                row[size:] = least[: units + 1 - size] + level.error
        choices[name] = errors.argmin(axis=0).astype(np.uint8)
        least = errors.min(axis=0)
    texts = dict.fromkeys(options, "")
    # The last matrix may take all units, the one before it what that leaves.
    for name in reversed([*options]):
        choice = int(choices[name][units])
        texts[name] = options[name][choice].format
        units -= taken[name][choice]
    return texts


def sort_upgrades(options: Mapping[str, Sequence[Level]]) -> list[Upgrade]:
    """Upgrades of all matrices, sorted by the error removed per byte, most first."""
    upgrades = [upgrade for name, levels in options.items() for upgrade in _upgrades(name, levels)]
    # The sort is stable: a matrix whose error is zero is still upgraded level by level.
    return sorted(upgrades, key=lambda upgrade: -upgrade.gain / upgrade.bytes)


def _upgrades(name: str, levels: Sequence[Level]) -> Iterator[Upgrade]:
    """Upgrades to the last level, each removing less error per byte than the one before it."""
    rest = levels
    while len(rest) > 1:
        steps = [
            Upgrade(name, to.format, to.bytes - rest[0].bytes, rest[0].error - to.error)
            for to in rest[1:]
        ]
        best = max(range(len(steps)), key=lambda i: steps[i].gain / steps[i].bytes)
        yield steps[best]
        rest = rest[best + 1 :]
