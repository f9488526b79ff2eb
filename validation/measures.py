"""Measures of the distance between two sets of vectors, scores or rankings.

They take float arrays and compute in float64. `..._figures` functions return a dictionary of
readable name to value.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..runtimes.vectors import cosines

TOP_K = 10


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Mask of the rows without NaN and infinity: [n] or [n, dim] to bool [n]."""
    return np.asarray(np.isfinite(values).all(axis=tuple(range(1, values.ndim))))


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds, float32; NaN and infinity stay, so that gates find them."""
    with np.errstate(over="ignore"):
        probabilities = (1 / (1 + np.exp(-log_odds.astype(np.float64)))).astype(np.float32)
    return np.where(np.isfinite(log_odds), probabilities, log_odds)


def cosine_figures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Summary of the cosines of finite rows [n, dim]; empty without rows."""
    if not len(a):
        return {}
    values = cosines(a, b)
    return {
        "mean cosine": float(values.mean()),
        "1st percentile of cosine": float(np.percentile(values, 1)),
        "minimum cosine": float(values.min()),
    }


def difference_figures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Summary of the absolute differences of finite scores of one shape; empty without scores."""
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
    """Agreement of two rankings of each query's documents, averaged over queries.

    Args:
        queries: (artifact's, reference's) finite scores of a query's documents, [documents] each. A
            query with fewer than two documents, or with only equal scores, is skipped.

    Returns:
        Kendall's tau-b and the overlap of the top documents; None if every query is skipped; empty
        without queries.
    """
    taus, overlaps, tops = [], [], []
    has_queries = False
    for artifact_scores, reference_scores in queries:
        has_queries = True
        tau = kendall_tau(artifact_scores, reference_scores)
        if np.isfinite(tau):
            # At most half: the top ten of six documents would always agree.
            k = min(TOP_K, len(artifact_scores) // 2)
            taus.append(tau)
            tops.append(k)
            overlaps.append(top_k_overlap(artifact_scores, reference_scores, k))
    if not taus:
        return {"Kendall tau": None, "top documents' overlap": None} if has_queries else {}
    return {
        "Kendall tau": float(np.mean(taus)),
        f"top-{max(tops)} overlap": float(np.mean(overlaps)),
    }


def top_k_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Fraction of the k highest of `a` [n] that are among the k highest of `b` [n]."""
    top_a, top_b = (np.argsort(-scores, kind="stable")[:k] for scores in (a, b))
    return len(np.intersect1d(top_a, top_b)) / k


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two score lists [n], in O(n log² n) time and O(n) memory.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b)); source:
    Knight (1966), "A Computer Method for Calculating Kendall's Tau with Ungrouped Data".

    Returns:
        -1 to 1; NaN if all values of one list are equal or there are fewer than two.
    """
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    pairs = len(a) * (len(a) - 1) // 2
    tied_a, tied_b = _tied_pairs(a), _tied_pairs(b)
    if pairs in (tied_a, tied_b):
        return np.nan
    tied_both = _tied_pairs(np.stack([a, b], axis=1))
    # Sorted by a, then b: an inversion in b is a discordant pair.
    discordant = _inversions(np.unique(b, return_inverse=True)[1])
    agreement = pairs - tied_a - tied_b + tied_both - 2 * discordant
    return float(agreement / np.sqrt(float(pairs - tied_a) * float(pairs - tied_b)))


def _tied_pairs(values: np.ndarray) -> int:
    counts = np.unique(values, axis=0, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _inversions(ranks: np.ndarray) -> int:
    """Number of pairs i < j with ranks[i] > ranks[j]; ranks are int64 [n], not negative."""
    total = 0
    for bit in range(int(ranks.max()).bit_length()):
        # A pair is counted at the highest bit in which it differs: in a group of equal higher bits,
        # each 0 forms an inversion with every 1 before it.
        order = np.argsort(ranks >> (bit + 1), kind="stable")
        groups = ranks[order] >> (bit + 1)
        ones = (ranks[order] >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        group_start = np.searchsorted(groups, groups)
        total += int(((1 - ones) * (ones_before - ones_before[group_start])).sum())
    return total
