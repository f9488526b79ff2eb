"""int8 codes in pairs: within the limit whatever rounds them, and little worse for it."""

from functools import partial

import numpy as np
import pytest

from embedport.errors import InputError
from embedport.quantize.gptq import Curvature, quantize_gptq
from embedport.quantize.mse import quantize_mse
from embedport.quantize.pairs import SHARES, find_excess
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme

LIMITED = QuantScheme(8, None, symmetric=True, limits_pairs=True)
PLAIN = QuantScheme(8, None, symmetric=True)
WIDTH = 97
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.standard_normal((400, WIDTH)) @ RANDOM.standard_normal((WIDTH, WIDTH))
HESSIAN = INPUTS.T @ INPUTS / len(INPUTS)
ROUNDINGS = {
    "rtn": quantize_rtn,
    "rtn, clipped": partial(quantize_rtn, share=0.6),
    "mse": quantize_mse,
    "mse by importance": partial(
        quantize_mse, importance=np.linspace(0, 9, WIDTH, dtype=np.float32)
    ),
    "gptq": lambda weight, scheme: quantize_gptq(weight, Curvature(HESSIAN), scheme),
    "gptq in order": lambda weight, scheme: quantize_gptq(
        weight, Curvature(HESSIAN, act_order=False), scheme
    ),
}
WEIGHTS = {
    "the largest everywhere": np.ones((3, WIDTH)),
    "alternating": np.tile([1, -1], (3, WIDTH))[:, :WIDTH],
    "no weights": np.zeros((3, WIDTH)),
    "uniform": RANDOM.uniform(-1, 1, (40, WIDTH)),
    "normal": RANDOM.standard_normal((40, WIDTH)),
    "heavy tails": RANDOM.standard_t(3, (40, WIDTH)),
    # Halves of a step, pairs of which sum to 129 when both are rounded away from zero.
    "halves": RANDOM.integers(-254, 255, (40, WIDTH)) / 2,
    "tiny": RANDOM.standard_normal((3, WIDTH)) * 1e-38,
}


def signed(tensor):
    return (tensor.codes - np.uint8(128)).view(np.int8)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_pairs_are_within_the_limit(kind, rounding):
    weight = WEIGHTS[kind].astype(np.float32)
    codes = signed(ROUNDINGS[rounding](weight, LIMITED)).astype(int)
    sums = codes[:, 0:-1:2] + codes[:, 1::2]
    assert np.abs(sums).max() <= 128
    assert np.abs(codes).max() <= 127
    assert find_excess(codes.astype(np.int8)) is None


@pytest.mark.parametrize("kind", ["uniform", "normal", "heavy tails"])
def test_the_scale_is_the_one_with_the_least_error(kind):
    # Long rows, since the choice goes by an estimate.
    generator, shape = np.random.default_rng(2), (20, 1000)
    weight = {
        "uniform": lambda: generator.uniform(-1, 1, shape),
        "normal": lambda: generator.standard_normal(shape),
        "heavy tails": lambda: generator.standard_t(3, shape),
    }[kind]().astype(np.float32)

    def errors(tensor):
        return ((tensor.dequantize() - weight) ** 2).sum(axis=1)

    best = np.min([errors(quantize_rtn(weight, LIMITED, float(s))) for s in SHARES], axis=0)
    assert errors(quantize_rtn(weight, LIMITED)).sum() < 1.02 * best.sum()
    # At the largest share no pair is limited: that is 7 bits.
    assert best.sum() < errors(quantize_rtn(weight, LIMITED, float(SHARES[-1]))).sum()


def test_a_search_errs_less():
    def error(tensor):
        return ((tensor.dequantize() - weight) ** 2).sum()

    weight = WEIGHTS["normal"].astype(np.float32)
    assert error(quantize_mse(weight, LIMITED)) < 0.999 * error(quantize_rtn(weight, LIMITED))


def test_what_is_within_the_limit_already_is_rounded_to_nearest():
    weight = np.tile([1, -1], (3, WIDTH))[:, :WIDTH] * RANDOM.uniform(0.1, 1, (3, WIDTH))
    limited, plain = (quantize_rtn(weight.astype(np.float32), each) for each in (LIMITED, PLAIN))
    np.testing.assert_array_equal(limited.codes, plain.codes)
    np.testing.assert_array_equal(limited.scales, plain.scales)


def test_an_odd_last_input_has_the_whole_range():
    weight = np.zeros((1, 5), np.float32)
    weight[0, 4] = 1
    assert signed(quantize_rtn(weight, LIMITED)).tolist() == [[0, 0, 0, 0, 127]]


def test_gptq_makes_good_what_a_partner_does_not_leave():
    weight = WEIGHTS["normal"].astype(np.float32)

    def error(tensor):
        return (((tensor.dequantize() - weight) @ INPUTS.T) ** 2).sum()

    found = error(ROUNDINGS["gptq"](weight, LIMITED))
    assert found < 0.5 * error(quantize_mse(weight, LIMITED))


@pytest.mark.parametrize(
    ("codes", "found"),
    [([127, 1, 64, 64, 127], None), ([127, 2], (0, 0)), ([0, 0, -64, -65], (0, 2)), ([5], None)],
)
def test_find_excess(codes, found):
    assert find_excess(np.array([codes], np.int8)) == found


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, None, True), (8, 32, True), (8, None, False)]
)
def test_schemes_without_such_pairs(bits, group, symmetric):
    with pytest.raises(InputError, match="limits_pairs goes with"):
        QuantScheme(bits, group, symmetric, limits_pairs=True)
