import numpy as np
import pytest

from embedport.runtimes.vectors import cosines
from embedport.validation.measures import (
    cosine_figures,
    difference_figures,
    finite_rows,
    kendall_tau,
    rank_figures,
    top_k_overlap,
)


def brute_force_tau(a, b):
    """Tau-b by its definition."""
    i, j = np.triu_indices(len(a), 1)
    x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    return (x * y).sum() / np.sqrt(np.abs(x).sum() * np.abs(y).sum())


def test_cosines():
    a = np.array([[1, 0], [3, 4], [0, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    b = np.array([[0, 2], [4, 3], [1, 1], [1, 1], [1, 1]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [0, 0.96, 0, np.nan, np.nan], atol=1e-15)


def test_cosine_figures():
    angles = np.arange(101) / 100
    a = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    b = np.tile([1.0, 0.0], (101, 1))
    figures = cosine_figures(a, b)
    assert figures["minimum cosine"] == pytest.approx(np.cos(1), abs=1e-12)
    assert figures["1st percentile of cosine"] == pytest.approx(np.cos(0.99), abs=1e-12)
    assert figures["mean cosine"] == pytest.approx(np.cos(angles).mean(), abs=1e-12)
    assert cosine_figures(a[:0], b[:0]) == {}


def test_difference_figures():
    figures = difference_figures(np.array([0.5, 0.25], np.float32), np.array([0.5, 0.75]))
    assert figures == {"mean score difference": 0.25, "maximum score difference": 0.5}
    assert difference_figures(np.empty(0), np.empty(0)) == {}


def test_finite_rows():
    rows = np.array([[1, 2], [np.nan, 0], [0, -np.inf]])
    assert finite_rows(rows).tolist() == [True, False, False]
    assert finite_rows(rows[:, 0]).tolist() == [True, False, True]
    assert finite_rows(np.empty((0, 4))).tolist() == []


@pytest.mark.parametrize("values", [3, 10, 1000])
@pytest.mark.parametrize("n", [2, 3, 17, 200])
def test_kendall_tau_is_its_definition(n, values):
    """Few values make many ties."""
    generator = np.random.default_rng(n * values)
    for _ in range(20):
        a, b = generator.integers(values, size=(2, n)).astype(float)
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert kendall_tau(a, b) == pytest.approx(brute_force_tau(a, b), abs=1e-12)


def test_kendall_tau_of_known_rankings():
    # The example in scipy.stats.kendalltau's documentation.
    found = kendall_tau(np.array([12, 2, 1, 12, 2]), np.array([1, 4, 7, 1, 0]))
    assert found == pytest.approx(-0.47140452079103173, abs=1e-15)
    many = np.random.default_rng(0).standard_normal(50_000)
    assert kendall_tau(many, many) == 1
    assert kendall_tau(many, -many) == -1


def test_kendall_tau_without_an_order():
    assert np.isnan(kendall_tau(np.ones(4), np.arange(4.0)))
    assert np.isnan(kendall_tau(np.arange(4.0), np.ones(4)))
    assert np.isnan(kendall_tau(np.ones(1), np.ones(1)))
    assert np.isnan(kendall_tau(np.ones(0), np.ones(0)))


def test_top_k_overlap():
    a, b = np.array([5.0, 4, 3, 2, 1, 0]), np.array([5.0, 0, 4, 3, 2, 1])
    assert top_k_overlap(a, b, 1) == 1
    assert top_k_overlap(a, b, 2) == 0.5
    assert top_k_overlap(a, -a, 3) == 0


def test_rank_figures_of_few_documents_can_be_bad():
    """With six documents the top ten are always the same."""
    scores = np.arange(6.0)
    assert rank_figures([(scores, scores)]) == {"Kendall tau": 1, "top-3 overlap": 1}
    assert rank_figures([(scores, -scores)]) == {"Kendall tau": -1, "top-3 overlap": 0}
    assert rank_figures([(scores, scores), (scores, -scores)])["Kendall tau"] == 0


def test_rank_figures_leave_out_what_has_no_ranking():
    one, equal, scores = np.ones(1), np.ones(6), np.arange(40.0)
    nothing = rank_figures([(one, one), (equal, equal)])
    assert set(nothing.values()) == {None}
    assert "Kendall tau" in nothing
    assert rank_figures([]) == {}
    assert rank_figures([(one, one), (scores, scores)]) == {"Kendall tau": 1, "top-10 overlap": 1}
