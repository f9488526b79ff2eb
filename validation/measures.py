"""Measures of agreement between two sets of vectors or scores. NumPy only."""

from __future__ import annotations

import numpy as np


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, in float64.

    Args:
        a: float [n, dim].
        b: float [n, dim].

    Returns:
        float64 [n]; NaN where a row holds NaN.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(lengths, 1e-300)


def nonfinite_rows(values: np.ndarray) -> int:
    """How many rows of [n] or [n, dim] hold NaN or infinity."""
    return int((~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))).sum())


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two sets of scores of the same items (Kendall 1945, Biometrika 33).

    Args:
        a: float [n].
        b: float [n].

    Returns:
        From -1 to 1; 1 where either holds no order at all (n < 2, or all equal in both).
    """
    upper = np.triu_indices(len(a), k=1)
    signs_a = np.sign(a[:, None] - a[None, :])[upper]
    signs_b = np.sign(b[:, None] - b[None, :])[upper]
    untied_a, untied_b = np.abs(signs_a).sum(), np.abs(signs_b).sum()
    if untied_a == 0 or untied_b == 0:
        return 1.0 if untied_a == untied_b else 0.0
    return float((signs_a * signs_b).sum() / np.sqrt(untied_a * untied_b))


def top_k_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """The share of the k items with the highest scores in `a` that are also among b's.

    Args:
        a: float [n].
        b: float [n].
        k: At most n is used.
    """
    k = min(k, len(a))
    if k == 0:
        return 1.0
    best_a, best_b = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (a, b))
    return len(best_a & best_b) / k
