"""The suite on hand-made models, each with one mistake that real exports have had."""

import numpy as np
import pytest

from embedport.validation.invariance import LONG, make_cases, pad, run_suite, select_rows

GENERATOR = np.random.default_rng(1)
TABLE = GENERATOR.standard_normal((50, 8)).astype(np.float32)
ROWS = [GENERATOR.integers(50, size=size) for size in GENERATOR.integers(1, 300, size=40)]


def states(input_ids):
    """A causal model without a mask: each column's state is the mean of the columns up to it."""
    return np.cumsum(TABLE[input_ids], axis=1) / np.arange(1, input_ids.shape[1] + 1)[:, None]


def right_aligned(input_ids, attention_mask):
    """Real tokens first, in their order."""
    order = np.argsort(-attention_mask, axis=1, kind="stable")
    return np.take_along_axis(input_ids, order, axis=1)


def correct(input_ids, attention_mask):
    last = attention_mask.sum(axis=1) - 1
    return states(right_aligned(input_ids, attention_mask))[np.arange(len(input_ids)), last]


def pools_the_last_column(input_ids, attention_mask):
    return states(input_ids)[:, -1]


def takes_padding_to_be_on_the_right(input_ids, attention_mask):
    last = attention_mask.sum(axis=1) - 1
    return states(input_ids)[np.arange(len(input_ids)), last]


def attends_to_padding_on_the_left(input_ids, attention_mask):
    last = input_ids.shape[1] - 1 - np.argmax(attention_mask[:, ::-1], axis=1)
    return states(input_ids)[np.arange(len(input_ids)), last]


def drops_the_causal_mask_without_padding(input_ids, attention_mask):
    """huggingface/text-embeddings-inference#883."""
    if attention_mask.all() and len(input_ids) > 1:
        return TABLE[input_ids[:, ::-1]].cumsum(axis=1)[:, 0]
    return correct(input_ids, attention_mask)


def scales_over_the_batch(input_ids, attention_mask):
    """One quantization scale for all rows."""
    vectors = correct(input_ids, attention_mask)
    scale = np.abs(vectors).max() / 4
    return np.round(vectors / scale) * scale


def knows_a_batch_of_seven(input_ids, attention_mask):
    return correct(input_ids, attention_mask) * (-1 if len(input_ids) == 7 else 1)


def mixes_up_rows(input_ids, attention_mask):
    vectors = correct(input_ids, attention_mask)
    vectors[1:2] = vectors[:1]
    return vectors


def differing(model, max_length=64):
    return {
        outcome.case
        for outcome in run_suite(model, ROWS, max_length)
        if not np.allclose(outcome.results, outcome.alone, atol=1e-5)
    }


ALL = {case.name for case in make_cases(select_rows(ROWS))}
BATCHES = {"batches of 2", "batches of 7", "batches of 32"}
RIGHT = {"ragged batch, right padding", "extra right padding", "reversed order", *BATCHES}
LEFT = {"ragged batch, left padding", "extra left padding"}


def test_a_correct_model_passes():
    assert differing(correct) == set()
    outcomes = run_suite(correct, ROWS, 64)
    assert {outcome.case for outcome in outcomes} == ALL
    assert len(ALL) == 10


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (pools_the_last_column, RIGHT | LEFT),
        (takes_padding_to_be_on_the_right, LEFT),
        (attends_to_padding_on_the_left, LEFT),
        (drops_the_causal_mask_without_padding, {"equal-length batch"}),
        (scales_over_the_batch, ALL - {"batches of 1"}),
        (knows_a_batch_of_seven, {"batches of 7"}),
        (mixes_up_rows, ALL - {"batches of 1"}),
    ],
)
def test_a_mistake_is_caught_where_it_is(model, expected):
    assert differing(model) == expected


@pytest.mark.parametrize(
    ("max_length", "expected"), [(100, set()), (200, {"long rows"}), (4096, set(LONG))]
)
def test_long_rows_are_tried_as_far_as_the_model_takes_them(max_length, expected):
    widest = 0

    def wrong_when_long(input_ids, attention_mask):
        nonlocal widest
        widest = max(widest, int(attention_mask.sum(axis=1).max()))
        wrong = len(input_ids) > 1 and input_ids.shape[1] > 128
        return correct(input_ids, attention_mask) * (-1 if wrong else 1)

    assert differing(wrong_when_long, max_length) == expected
    assert widest <= max_length


def test_scores_are_one_number_a_row():
    for outcome in run_suite(lambda ids, mask: correct(ids, mask)[:, 0], ROWS, 64):
        np.testing.assert_allclose(outcome.results, outcome.alone, atol=1e-6)
        assert outcome.results.ndim == 1


@pytest.mark.parametrize("rows", [ROWS, [np.arange(400)] * 36, ROWS[:3], [np.arange(1)]])
def test_rows_are_cut_from_the_front_to_a_spread_of_lengths(rows):
    """Pairs for a reranker share a long prefix and are all long: cut alike they would be equal."""
    selected = select_rows(rows)
    assert len(selected) == 32
    assert max(map(len, selected)) <= 128
    whole = {tuple(row) for row in rows}
    assert all(any(row[-len(ids) :] == tuple(ids) for row in whole) for ids in selected)
    if min(map(len, rows)) > 128:
        assert len({len(ids) for ids in selected}) == 32


def test_cases_are_what_they_are_called():
    cases = {case.name: case for case in make_cases(select_rows(ROWS))}
    assert len({len(ids) for ids in cases["equal-length batch"].rows}) == 1
    assert len({len(ids) for ids in cases["ragged batch, right padding"].rows}) > 4
    for size in (1, 2, 7, 32):
        assert cases[f"batches of {size}"].batch == size
        assert len(cases[f"batches of {size}"].rows) == 32


def test_pad():
    rows = [np.array([5, 6]), np.array([7])]
    input_ids, attention_mask = pad(rows, "left", 1)
    assert input_ids.tolist() == [[6, 5, 6], [7, 7, 7]]
    assert attention_mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    input_ids, attention_mask = pad(rows, "right", 0)
    assert input_ids.tolist() == [[5, 6], [7, 7]]
    assert attention_mask.tolist() == [[1, 1], [1, 0]]
    assert input_ids.dtype == attention_mask.dtype == np.int64
