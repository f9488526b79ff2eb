"""The suite passes a good model and catches each way of going wrong."""

import numpy as np
import pytest

from embedport.validation.invariance import check_invariance

ROWS = [np.random.default_rng(i).integers(1, 100, 3 + 2 * i) for i in range(40)]


def real_tokens(input_ids, mask):
    return [ids[keep == 1] for ids, keep in zip(input_ids, mask, strict=True)]


def embed(tokens):
    """Depends on every token and its place."""
    return np.array([np.sin(tokens * f + np.arange(len(tokens))).sum() for f in (0.1, 0.7, 1.3)])


def good(input_ids, mask):
    return np.stack([embed(tokens) for tokens in real_tokens(input_ids, mask)])


def test_a_good_model():
    agreement = check_invariance(good, ROWS)
    assert len(agreement) == 10
    assert min(agreement.values()) == pytest.approx(1, abs=1e-12)


def last_position(input_ids, mask):
    """Pools at the last position, padding or not."""
    return np.stack([embed(ids) for ids in input_ids])


def first_tokens(input_ids, mask):
    """Takes the first tokens of a row, as many as are real: right padding only."""
    return np.stack([embed(i[: m.sum()]) for i, m in zip(input_ids, mask, strict=True)])


def mixes_batch(input_ids, mask):
    """One quantization scale for the whole batch."""
    vectors = good(input_ids, mask)
    scale = np.abs(vectors).max() / 3
    return np.round(vectors / scale) * scale + 1e-9


def unmasked_when_equal(input_ids, mask):
    """Drops its causal mask when no row of a batch is padded."""
    vectors = good(input_ids, mask)
    return vectors[:, ::-1] if mask.all() and len(mask) > 1 else vectors


def forgets_order(input_ids, mask):
    """Returns rows sorted by length."""
    order = np.argsort(mask.sum(axis=1), kind="stable")
    return good(input_ids[order], mask[order])


@pytest.mark.parametrize(
    ("model", "case"),
    [
        (last_position, "ragged batch"),
        (last_position, "extra padding on the right"),
        (first_tokens, "left padding"),
        (first_tokens, "padding on both sides"),
        (mixes_batch, "batches of 7"),
        (unmasked_when_equal, "equally long batch"),
        (forgets_order, "another order"),
    ],
)
def test_bad_models(model, case):
    assert check_invariance(model, ROWS)[case] < 0.99


def test_scores():
    def scores(input_ids, mask):
        return np.array([embed(tokens)[0] for tokens in real_tokens(input_ids, mask)])

    assert max(check_invariance(scores, ROWS).values()) == 0
    wrong = check_invariance(lambda ids, mask: scores(ids, mask) + len(ids) * 0.01, ROWS)
    assert wrong["batches of 7"] == pytest.approx(0.06)


def test_few_rows_and_rows_that_begin_alike():
    assert min(check_invariance(good, ROWS[:1]).values()) == pytest.approx(1)
    prefix = np.arange(100)
    alike = [np.concatenate([prefix, row]) for row in ROWS]
    assert check_invariance(first_tokens, alike)["left padding"] < 0.99
