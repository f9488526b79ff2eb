"""Scores on MTEB's tasks without mteb: the interval, and what is refused before anything runs."""

import sys

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reference
from embedport.errors import InputError, MissingPackageError
from embedport.validation.gates import task_gates
from embedport.validation.mteb_scores import (
    Samples,
    TaskFacts,
    TaskScore,
    compare_scores,
    task_interval,
)
from embedport.validation.retrieval import bootstrap
from embedport.validation.thresholds import find_thresholds

DRAW = np.random.default_rng(0)
GOLD = DRAW.integers(0, 6, 200).astype(float)
NEAR, FAR = GOLD + DRAW.normal(0, 0.5, 200), GOLD + DRAW.normal(0, 2, 200)


def test_correlations_are_scipys():
    assert Samples(NEAR, GOLD, ranked=True).score == pytest.approx(spearmanr(NEAR, GOLD)[0])
    assert Samples(NEAR, GOLD).score == pytest.approx(pearsonr(NEAR, GOLD)[0])
    assert Samples(NEAR).score == pytest.approx(NEAR.mean())


def test_the_interval_of_a_mean_is_that_of_retrieval():
    found, expected = DRAW.random(300), DRAW.random(300)
    key = ("test", "default")
    interval = task_interval({key: Samples(found)}, {key: Samples(expected)})
    assert interval is not None
    np.testing.assert_allclose(interval, bootstrap(found - expected), atol=3e-3)


def test_the_interval_of_a_correlation_over_two_subsets():
    found = {
        ("test", subset): Samples(values, GOLD, ranked=True)
        for subset, values in (("a", FAR), ("b", NEAR))
    }
    expected = {key: Samples(NEAR, GOLD, ranked=True) for key in found}
    interval = task_interval(found, expected)
    assert interval is not None
    differences = [
        (spearmanr(FAR[rows], GOLD[rows])[0] - spearmanr(NEAR[rows], GOLD[rows])[0]) / 2
        for rows in DRAW.integers(0, 200, (200, 200))
    ]
    np.testing.assert_allclose(interval, np.percentile(differences, [2.5, 97.5]), atol=0.02)
    assert task_interval(expected, expected) == (0, 0)


def test_without_the_same_samples_there_is_no_interval():
    one, other = ({("test", "a"): Samples(np.zeros(count))} for count in (3, 4))
    assert task_interval(one, other) is None
    assert task_interval({}, {}) is None


def test_rows():
    facts = TaskFacts("SciFact", "Retrieval", "ndcg_at_10", "mteb/scifact", "1")
    values = {("test", "default"): Samples(np.array([0.5, 0.7]))}
    found, expected = TaskScore(0.6, values, 0), TaskScore(0.7, {}, 0)
    report = compare_scores([facts], [found], [expected], version="2", run="fp16, cuda")
    (row,) = report.rows
    assert (row.samples, row.interval) == (None, "none: one score")
    assert row.difference == pytest.approx(-0.1)
    (row,) = compare_scores([facts], [found], [found], version="2", run="fp16, cuda").rows
    assert (row.samples, row.interval) == (2, "+0.0000 to +0.0000")


def test_a_reference_that_scores_nothing_measures_nothing():
    facts = [TaskFacts(name, "Retrieval", "ndcg_at_10", "", "1") for name in ("lost", "found")]
    zero, half = TaskScore(0.0, {}, 0), TaskScore(0.5, {}, 0)
    report = compare_scores(facts, [zero, zero], [zero, half], version="2", run="fp16, cuda")
    gates = task_gates(report, [zero, zero], [zero, half], find_thresholds("fp32"))
    assert [gate.verdict for gate in gates[2:]] == ["not measured", "fails"]


def test_nan_of_either_side_fails():
    facts = [TaskFacts("SciFact", "Retrieval", "ndcg_at_10", "mteb/scifact", "1")]
    sound, bad = TaskScore(0.5, {}, 0), TaskScore(0.5, {}, 1)
    for sides, verdicts in (
        ((bad, sound), ["fails", "holds", "holds"]),
        ((sound, bad), ["holds", "fails", "holds"]),
    ):
        found, expected = ([side] for side in sides)
        report = compare_scores(facts, found, expected, version="2", run="fp16, cuda")
        gates = task_gates(report, found, expected, find_thresholds("fp32"))
        assert [gate.verdict for gate in gates] == verdicts


def test_refused_before_the_model_is_loaded(folders, monkeypatch):
    made = folders("embedding")
    recorded = builtin_reference(builtin_embedder())
    with pytest.raises(InputError, match="recorded reference, which has no results of MTEB's"):
        embedport.validate(made.artifact, recorded, mteb=["STS17"])
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingPackageError, match=r"embedport\[mteb\]"):
        embedport.validate(made.artifact, made.checkpoint, mteb=["STS17"])
    with pytest.raises(MissingPackageError, match=r"embedport\[mteb\]"):
        embedport.mteb_model(embedport.load(made.artifact, device="cpu"))
