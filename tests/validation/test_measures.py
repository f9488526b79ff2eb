"""The measures, against values known beforehand."""

import itertools

import numpy as np
import pytest

from embedport.validation.measures import cosines, kendall_tau, nonfinite_rows, top_k_overlap


def test_cosines():
    a = np.array([[1, 0], [1, 1], [3, 4]], np.float32)
    b = np.array([[0, 2], [1, 0], [3, 4]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [0, np.sqrt(0.5), 1], atol=1e-12)
    assert np.isnan(cosines(np.array([[np.nan, 1]]), np.array([[1.0, 1]]))[0])


def test_nonfinite_rows():
    assert nonfinite_rows(np.array([[1, np.nan], [np.inf, np.inf], [1, 2]])) == 2
    assert nonfinite_rows(np.array([0.5, -np.inf])) == 1
    assert nonfinite_rows(np.empty((0, 4))) == 0


def slow_tau(a, b):
    """Tau-b by its definition, pair by pair."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    products = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
    untied = [sum(x[i] != x[j] for i, j in pairs) for x in (a, b)]
    return sum(products) / np.sqrt(untied[0] * untied[1])


@pytest.mark.parametrize("values", [1000, 5])
def test_kendall_tau(values):
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, values, (2, 12)).astype(float)
        assert kendall_tau(a, b) == pytest.approx(slow_tau(a, b))


def test_kendall_tau_at_the_ends():
    order = np.arange(9.0)
    assert kendall_tau(order, order**3) == 1
    assert kendall_tau(order, -order) == -1
    assert kendall_tau(np.ones(3), np.ones(3)) == 1
    assert kendall_tau(order[:1], order[:1]) == 1
    assert kendall_tau(np.ones(3), order[:3]) == 0


def test_top_k_overlap():
    a, b = np.array([9.0, 8, 7, 1, 2, 3]), np.array([9.0, 1, 8, 7, 2, 3])
    assert top_k_overlap(a, b, 3) == pytest.approx(2 / 3)
    assert top_k_overlap(a, b, 1) == 1
    assert top_k_overlap(a, b, 100) == 1
    assert top_k_overlap(a[:0], b[:0], 3) == 1
