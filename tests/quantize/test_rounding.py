"""Schemes and the three roundings: what a code stands for, and which loses least."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedport.errors import CheckpointError, InputError
from embedport.quantize import mse, source
from embedport.quantize.awq import search_factors
from embedport.quantize.gptq import Curvature, quantize_gptq
from embedport.quantize.mse import quantize_mse
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantizedTensor, QuantScheme

SCHEMES = [
    QuantScheme(4, 32, symmetric=False),
    QuantScheme(4, 64, symmetric=True),
    QuantScheme(8, None, symmetric=True),
    QuantScheme(8, 48, symmetric=False),
]


@pytest.fixture
def weight():
    """Mostly small values, and a few channels that are larger."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((96, 200)).astype(np.float32)
    values[:, ::37] *= 6
    return values


@pytest.fixture
def inputs():
    """Correlated inputs, some channels larger than others."""
    generator = np.random.default_rng(1)
    mixing = generator.standard_normal((200, 200)) / 14 + np.diag(3 * generator.random(200))
    return (generator.standard_normal((800, 200)) @ mixing).astype(np.float32)


def test_a_code_stands_for_its_value():
    scheme = QuantScheme(4, 16, symmetric=False)
    codes = np.arange(20, dtype=np.uint8)[None] % 16
    tensor = QuantizedTensor(
        scheme, codes, np.array([[0.5, 2]], np.float32), np.array([[8, 3]], np.uint8)
    )
    expected = [*(np.arange(16) - 8.0) * 0.5, *(np.arange(4) - 3.0) * 2]
    np.testing.assert_array_equal(tensor.dequantize()[0], np.array(expected, np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("quantize", [quantize_rtn, quantize_mse])
def test_what_is_quantized_already_stays(scheme, quantize, weight):
    once = quantize_rtn(weight, scheme).dequantize()
    np.testing.assert_allclose(quantize(once, scheme).dequantize(), once, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_errs_by_half_a_step(scheme, weight):
    tensor = quantize_rtn(weight, scheme)
    steps = np.repeat(tensor.scales, scheme.group_size or 200, axis=1)[:, :200]
    # A zero point is rounded too: at the end of a range that can cost another half.
    limit = 0.5 if scheme.symmetric else 1.0
    assert (np.abs(tensor.dequantize() - weight) <= (limit + 1e-4) * steps).all()
    assert tensor.codes.max() < 2**scheme.bits
    if scheme.symmetric:
        assert set(tensor.zero_points.ravel()) == {2 ** (scheme.bits - 1)}


@pytest.mark.parametrize("scheme", [each for each in SCHEMES if not each.symmetric])
def test_a_zero_point_is_at_the_end_of_values_of_one_sign(scheme, weight):
    for values, zero in ((np.abs(weight), 0), (-np.abs(weight), scheme.levels - 1)):
        tensor = quantize_rtn(values, scheme)
        assert set(tensor.zero_points.ravel()) == {zero}
        steps = np.repeat(tensor.scales, scheme.group_size, axis=1)[:, :200]
        assert (np.abs(tensor.dequantize() - values) <= 0.5001 * steps).all()


def test_zeros_stay_zeros():
    for scheme in SCHEMES:
        assert not quantize_mse(np.zeros((2, 96), np.float32), scheme).dequantize().any()


@pytest.mark.parametrize("scheme", [each for each in SCHEMES if each.bits == 4])
def test_each_algorithm_is_better_than_the_one_before(scheme, weight, inputs):
    def weight_error(tensor):
        return ((tensor.dequantize() - weight) ** 2).sum()

    def output_error(tensor):
        return (((tensor.dequantize() - weight) @ inputs.T) ** 2).sum()

    hessian = inputs.T @ inputs / len(inputs)
    rounded, ranged = quantize_rtn(weight, scheme), quantize_mse(weight, scheme)
    assert weight_error(ranged) < 0.98 * weight_error(rounded)
    plain = quantize_gptq(weight, Curvature(hessian, act_order=False), scheme)
    ordered = quantize_gptq(weight, Curvature(hessian), scheme)
    assert output_error(plain) < 0.7 * output_error(ranged)
    assert max(tensor.codes.max() for tensor in (ranged, plain, ordered)) == scheme.levels - 1
    assert output_error(ordered) < output_error(plain)


@pytest.mark.parametrize("scheme", [SCHEMES[0], QuantScheme(8, None, True, limits_pairs=True)])
def test_a_large_matrix_is_rounded_in_parts(weight, scheme, monkeypatch):
    importance = np.linspace(1, 9, 200, dtype=np.float32)
    rounding = partial(quantize_mse, importance=importance)
    whole = rounding(weight, scheme)
    spec: Any = SimpleNamespace(tensor_shapes=lambda: {"x.weight": weight.shape})
    model: Any = SimpleNamespace(spec=spec, read_fp32=lambda name, rows: weight[rows])
    monkeypatch.setattr(source, "CHUNK_VALUES", 200 * 40)
    monkeypatch.setattr(mse, "CHUNK_VALUES", 200 * 7)
    found = source.quantize_rows(model, "x", scheme, rounding)
    for name in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_importance_decides_what_is_kept():
    generator = np.random.default_rng(0)
    values = generator.standard_normal((64, 64)).astype(np.float32)
    importance = np.where(np.arange(64) < 4, 1000, 1).astype(np.float32)
    scheme = QuantScheme(4, 64, symmetric=False)

    def error(tensor):
        return ((tensor.dequantize() - values)[:, :4] ** 2).sum()

    assert error(quantize_mse(values, scheme, importance)) < error(quantize_mse(values, scheme))


def test_awq_spares_the_channels_that_matter(weight, inputs):
    inputs[:, 5:9] *= 30
    scheme = QuantScheme(4, 64, symmetric=False)
    factors = search_factors([weight], inputs, [scheme])
    assert factors[5:9].min() > 2 * np.median(factors)

    def output_error(tensor, undo):
        return (((tensor.dequantize() / undo - weight) @ inputs.T) ** 2).sum()

    scaled = output_error(quantize_mse(weight * factors, scheme), factors)
    assert scaled < 0.5 * output_error(quantize_mse(weight, scheme), 1)


def test_awq_takes_the_power_that_errs_least(weight, inputs):
    """Inputs have real sizes, and one of them is dead; the factors are around 1."""
    weight, inputs = weight[:16, :64], inputs[:100, :64]
    inputs = inputs * np.exp(np.random.default_rng(0).normal(0, 1.5, 64)).astype(np.float32)
    inputs[:, 3] = 0
    scheme, sizes = QuantScheme(4, 32, symmetric=False), np.abs(inputs).mean(axis=0)
    sizes[3] = 1e-6

    def factors(alpha):
        values = sizes**alpha
        return (values / np.sqrt(values.max() * values.min())).astype(np.float32)

    def error(alpha):
        scaled = weight * factors(alpha)
        importance = (inputs**2).mean(axis=0) / factors(alpha) ** 2
        found = quantize_mse(scaled, scheme, importance).dequantize() / factors(alpha)
        return (((found - weight) @ inputs.T) ** 2).sum()

    best = min(np.linspace(0, 1, 11), key=error)
    assert 0 < best < 1
    np.testing.assert_allclose(search_factors([weight], inputs, [scheme]), factors(best), rtol=1e-5)


def test_gptq_does_not_see_how_large_inputs_are(weight, inputs):
    hessian = inputs.T @ inputs / len(inputs)
    large, small = (
        quantize_gptq(weight, Curvature(hessian * np.float32(size)), SCHEMES[0])
        for size in (1, 2**-20)
    )
    np.testing.assert_array_equal(small.codes, large.codes)


def test_dead_inputs_are_no_obstacle(weight, inputs):
    inputs[:, :150] = 0
    scheme = QuantScheme(4, 32, symmetric=False)
    tensor = quantize_gptq(weight, Curvature(inputs.T @ inputs / len(inputs)), scheme)
    live = (tensor.dequantize() - weight)[:, 150:]
    assert np.abs(live).max() < np.abs(weight).max() / 4


def test_the_root_is_of_the_damped_inverse(inputs):
    hessian = inputs.T @ inputs / len(inputs)
    found = Curvature(hessian)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(200)
    inverse = np.linalg.inv(damped[np.ix_(found.order, found.order)])
    np.testing.assert_allclose(found.upper.T @ found.upper, inverse, rtol=1e-3, atol=1e-5)
    assert not np.tril(found.upper, -1).any()


def test_gptaq_makes_good_what_changed_the_inputs(weight, inputs):
    """Inputs that rounding moved: nearer to the original products than GPTQ can come."""
    moved = inputs + inputs @ np.random.default_rng(2).normal(0, 0.01, (200, 200)).astype("f")
    curvature = Curvature(moved.T @ moved / len(moved))
    shifted = curvature.shifted(weight, (inputs - moved).T @ moved / len(moved))

    def error(matrix):
        rounded = quantize_gptq(matrix, curvature, SCHEMES[0]).dequantize()
        return ((moved @ rounded.T - inputs @ weight.T) ** 2).sum()

    # Without rounding, the change of the matrix is a least squares solution, damped.
    damping = np.sqrt(0.01 * (moved**2).mean() * len(moved)) * np.eye(200)
    wanted = np.concatenate([(inputs - moved) @ weight.T, np.zeros((200, len(weight)))])
    change = np.linalg.lstsq(np.concatenate([moved, damping]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(shifted - weight, change, atol=1e-3)
    assert error(shifted) < 0.8 * error(weight)


def test_a_hessian_that_is_not_finite():
    with pytest.raises(CheckpointError, match="not finite"):
        Curvature(np.full((200, 200), np.nan))


def test_a_hessian_that_is_not_positive():
    """Rounding makes one: it is damped ten times as much, up to a limit."""
    hessian = np.diag([2.0, 1.0, -0.05])
    found = Curvature(hessian, act_order=False).upper
    damping = 0.1 * np.diag(hessian).mean()
    np.testing.assert_allclose(found.T @ found, np.linalg.inv(hessian + damping * np.eye(3)), 1e-5)
    with pytest.raises(CheckpointError, match="cannot be inverted: give more texts"):
        Curvature(np.diag([1.0, -1.0]))


@pytest.mark.parametrize(("bits", "group", "nf4"), [(3, 32, False), (8, 8, False), (8, 64, True)])
def test_schemes_that_do_not_exist(bits, group, nf4):
    with pytest.raises(InputError):
        QuantScheme(bits, group, symmetric=True, nf4=nf4)
