"""Measures of how far two sets of vectors, scores or rankings are from each other.

All take float arrays and compute in float64; figures are dictionaries of name to value, for people.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..ranking import unit

TOP_K = 10
# How far from 1 the length of a unit vector may be, in 16 bits.
UNIT = 1e-2


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Which rows hold no NaN and no infinity: [n] or [n, dim] to bool [n]."""
    return np.asarray(np.isfinite(values).all(axis=tuple(range(1, values.ndim))))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row to its counterpart: [n, dim] twice to float64 [n].

    NaN where a row is not finite, 0 where it is zero.
    """
    return (unit(a) * unit(b)).sum(axis=1)


def cosine_figures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Summary of the cosines of finite rows [n, dim]; empty when there are none."""
    if not len(a):
        return {}
    values = cosines(a, b)
    return {
        "mean cosine": float(values.mean()),
        "1st percentile of cosine": float(np.percentile(values, 1)),
        "minimum cosine": float(values.min()),
    }


def difference_figures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Summary of the absolute differences of finite scores of one shape; empty when none."""
    if not a.size:
        return {}
    values = np.abs(a.astype(np.float64) - b)
    return {
        "mean score difference": float(values.mean()),
        "maximum score difference": float(values.max()),
    }


def rank_figures(
    queries: Iterable[tuple[np.ndarray, np.ndarray]],
) -> dict[str, float | None]:
    """Agreement of the rankings of each query's documents, averaged over queries.

    Args:
        queries: (found, expected) finite scores of a query's documents, [documents] each. A query
            with fewer than two documents, or with equal scores only, has no ranking.

    Returns:
        Kendall's tau-b and the overlap of the top documents; None where no query has a ranking;
        empty without queries.
    """
    taus, overlaps, tops = [], [], []
    asked = False
    for found, expected in queries:
        asked = True
        tau = kendall_tau(found, expected)
        if np.isfinite(tau):
            # The top ten of six documents would always agree.
            k = min(TOP_K, len(found) // 2)
            taus.append(tau)
            tops.append(k)
            overlaps.append(top_k_overlap(found, expected, k))
    if not taus:
        return {"Kendall tau": None, "top documents' overlap": None} if asked else {}
    return {
        "Kendall tau": float(np.mean(taus)),
        f"top-{max(tops)} overlap": float(np.mean(overlaps)),
    }


def top_k_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of the k highest of `a` [n] that are among the k highest of `b` [n]."""
    top_a, top_b = (np.argsort(-scores, kind="stable")[:k] for scores in (a, b))
    return len(np.intersect1d(top_a, top_b)) / k


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two score lists [n], in O(n log² n) time and O(n) memory.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b)); source:
    Knight (1966), "A Computer Method for Calculating Kendall's Tau with Ungrouped Data".

    Returns:
        -1 to 1; NaN when all values of one list are equal, or there are fewer than two.
    """
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    pairs = len(a) * (len(a) - 1) // 2
    tied_a, tied_b = _tied_pairs(a), _tied_pairs(b)
    if pairs in (tied_a, tied_b):
        return np.nan
    tied_both = _tied_pairs(np.stack([a, b], axis=1))
    # Sorted by a, then b: what is out of order in b is discordant.
    discordant = _inversions(np.unique(b, return_inverse=True)[1])
    agreement = pairs - tied_a - tied_b + tied_both - 2 * discordant
    return float(agreement / np.sqrt(float(pairs - tied_a) * float(pairs - tied_b)))


def _tied_pairs(values: np.ndarray) -> int:
    counts = np.unique(values, axis=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _inversions(ranks: np.ndarray) -> int:
    """How many pairs i < j have ranks[i] > ranks[j]; ranks are int64 [n], not negative."""
    total = 0
    for bit in range(int(ranks.max()).bit_length()):
        # A pair is counted at the highest bit in which it differs: within a group of equal higher
        # bits, each 0 is out of order with the 1s before it.
        order = np.argsort(ranks >> (bit + 1), kind="stable")
        groups = ranks[order] >> (bit + 1)
        ones = (ranks[order] >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        group_start = np.searchsorted(groups, groups)
        total += int(((1 - ones) * (ones_before - ones_before[group_start])).sum())
    return total
