"""Rotation and balance: another model, the same function."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.tensor_files import SINGLE
from embedport.checkpoint.weights import Weights
from embedport.quantize.rotation import RotatedHeads, RotatedWeights
from embedport.quantize.schemes import QuantScheme
from embedport.quantize.smoothquant import balanced, factors_help, smoothing_factors
from embedport.texts.samples import builtin_pairs, builtin_samples
from tests.pipeline.conftest import add_biases
from tests.synthetic import plant_outliers

TEXTS = [sample.text for sample in builtin_samples()]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]


def forward(source, ids):
    """Qwen3 in float64, as its report describes it: the final norm's output of the last token."""
    spec = source.spec

    def read(name):
        return source.read_fp32(f"{name}.weight").astype(np.float64)

    def project(x, name):
        bias = f"{name}.bias"
        added = source.read_fp32(bias) if bias in spec.tensor_shapes() else 0
        return x @ read(name).T + added

    def norm(x, gains):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.rms_norm_eps) * gains

    half = spec.head_dim // 2
    angles = np.arange(len(ids))[:, None] / spec.rope.theta ** (np.arange(half) / half)

    def turn(x):
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = read("embed_tokens")[ids]
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    for layer in range(spec.num_layers):
        p = f"layers.{layer}"
        h = norm(x, read(f"{p}.input_layernorm"))
        q, k, v = (
            project(h, f"{p}.self_attn.{name}_proj").reshape(len(ids), -1, spec.head_dim)
            for name in "qkv"
        )
        q = turn(norm(q, read(f"{p}.self_attn.q_norm")))
        k = turn(norm(k, read(f"{p}.self_attn.k_norm")))
        shared = spec.num_heads // spec.num_kv_heads
        k, v = (np.repeat(each, shared, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(spec.head_dim)
        weights = np.exp(np.where(causal, scores - scores.max(), -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(ids), -1)
        x = x + project(attended, f"{p}.self_attn.o_proj")
        h = norm(x, read(f"{p}.post_attention_layernorm"))
        gate, up = (h @ read(f"{p}.mlp.{name}_proj").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ read(f"{p}.mlp.down_proj").T
    out = norm(x[-1], read("norm"))
    return out if source.output_rotation is None else out @ source.output_rotation


@pytest.fixture(params=["kv1", "kv2", "kv8", "biased"])
def weights(request, checkpoints, copied):
    if request.param == "biased":
        folder = copied(checkpoints("kv2"))
        add_biases(folder, seed=0)
    else:
        folder = checkpoints(request.param)
    return Weights(ModelSpec.from_checkpoint(folder))


@pytest.mark.parametrize(
    "transform",
    [
        RotatedWeights,
        RotatedHeads.seeded,
        balanced,
        lambda weights: balanced(RotatedWeights(weights)),
    ],
)
def test_the_function_is_the_same(weights, transform):
    ids = np.random.default_rng(0).integers(0, 1000, 24)
    expected, found = forward(weights, ids), forward(transform(weights), ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_rotation_changes_every_matrix(weights):
    rotated = RotatedWeights(weights)
    for name in weights.spec.tensor_shapes():
        if len(weights.spec.tensor_shapes()[name]) == 2 and name != "lm_head.weight":
            assert not np.allclose(rotated.read_fp32(name), weights.read_fp32(name), atol=1e-3)


def test_a_head_in_a_rotated_basis(checkpoints):
    """As it reads the final norm's output without gains: in the other basis, with the gains."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv2", "reranker")))
    rotated = RotatedWeights(weights)
    expected = rotated.output_rotation @ weights.answer_row(9, 4)
    np.testing.assert_allclose(rotated.answer_row(9, 4), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gains_in_16_bits_are_exact(checkpoints, copied, dtype):
    """But for those that 16 bits take for zero: no matrix is divided by it."""
    folder = copied(checkpoints("kv2"))
    tensors, name = load_file(folder / SINGLE), "layers.0.input_layernorm.weight"
    gains = tensors[name].astype(np.float32)
    gains[:2] = 0, 1e-30
    save_file({**tensors, name: gains}, folder / SINGLE, metadata={"format": "pt"})
    weights, kind = Weights(ModelSpec.from_checkpoint(folder)), np.dtype(dtype)
    smooth = balanced(weights).rounded(kind)
    found = smooth.read_fp32(name)
    stored = found.astype(kind).astype(np.float32)
    np.testing.assert_allclose(stored[2:], found[2:], rtol=2e-7)
    assert (stored[1] == 0) == (dtype == "float16")
    for matrix in ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"):
        product = smooth.read_fp32(matrix) * found
        np.testing.assert_allclose(product, weights.read_fp32(matrix) * gains, rtol=1e-6)


@pytest.mark.parametrize("transform", [RotatedWeights, RotatedHeads.seeded, balanced])
def test_rows_are_rows_of_the_whole(weights, transform):
    source = transform(weights)
    for name in weights.spec.tensor_shapes():
        if name != "lm_head.weight":
            whole = source.read_fp32(name)
            np.testing.assert_array_equal(source.read_fp32(name, slice(3, 9)), whole[3:9])


def test_rotated_heads_leave_all_else(weights):
    rotated = RotatedHeads.seeded(weights)
    for name in weights.spec.tensor_shapes():
        if name != "lm_head.weight":
            same = np.array_equal(rotated.read_fp32(name), weights.read_fp32(name))
            turned = ("v_proj.weight", "v_proj.bias", "o_proj.weight")
            assert same != name.endswith(turned), name


def test_balance_takes_outlier_channels_away(checkpoints, copied):
    folder = copied(checkpoints("kv8"))
    plant_outliers(folder)
    source = Weights(ModelSpec.from_checkpoint(folder))

    def spread(weights):
        gains = np.abs(weights.read_fp32("layers.0.input_layernorm.weight"))
        return gains.max() / np.median(gains)

    assert spread(source) > 1000
    assert spread(balanced(source)) < 10


def test_rotated_artifacts(checkpoints, tmp_path):
    """The whole way: a rotated graph gives vectors and scores in the checkpoint's own basis."""

    def load(task, name, **options):
        folder = embedport.export(checkpoints("kv1", task), tmp_path / name, **options).folder
        return embedport.load(folder)

    plain, turned = (
        load("embedding", f"embedder-{rotate}", precision="int8-weight", rotate=rotate)
        for rotate in (False, True)
    )
    expected = load("embedding", "fp32").encode(TEXTS)
    cosines = [(each.encode(TEXTS) * expected).sum(1).min() for each in (plain, turned)]
    assert min(cosines) > 0.998
    short = load("embedding", "short", precision="int8-weight", rotate=True, dim=32)
    np.testing.assert_allclose(short.encode(TEXTS), turned.encode(TEXTS, dim=32), atol=1e-6)
    turned = load("reranker", "reranker", precision="int8-weight", rotate=True)
    expected = load("reranker", "reranker-fp32").score(PAIRS)
    assert np.abs(turned.score(PAIRS) - expected).max() < 0.02


def test_smoothing_factors_are_known():
    """Channels that nothing reads, or that are zero, keep theirs: nothing can be measured there."""
    activations, weights = np.array([[16, 1, 0, 3], [1, 1, 1, 0]], np.float32)
    np.testing.assert_allclose(smoothing_factors(activations, weights), [2, 0.5, 1, 1])


def test_a_balance_estimates_what_the_swiglu_gives(checkpoints):
    """As large as its two rows, with the gains that both read."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv2")))
    gains, up, gate, down = (
        weights.read_fp32(f"layers.1.{name}.weight").astype(np.float64)
        for name in (
            "post_attention_layernorm",
            *(f"mlp.{part}_proj" for part in ("up", "gate", "down")),
        )
    )
    sizes = np.linalg.norm(up * gains, axis=1) * np.linalg.norm(gate * gains, axis=1)
    factors = np.sqrt(sizes / np.abs(down).max(axis=0))
    expected = down * factors / np.exp(np.log(factors).mean())
    found = balanced(weights).read_fp32("layers.1.mlp.down_proj.weight")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("outlier", [1, 100])
def test_smoothing_is_for_outliers(outlier):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 96)).astype(np.float32)
    inputs = generator.normal(size=(200, 96)).astype(np.float32)
    # Magnitudes of a few weights spread; those of the inputs do not, but for one channel.
    weight[0] *= np.linspace(1, 8, 96, dtype=np.float32)
    inputs[:, 5] *= outlier
    factors = smoothing_factors(np.abs(inputs).max(axis=0), np.abs(weight).max(axis=0))
    scheme = QuantScheme(8, None, symmetric=True)
    assert factors_help(factors, [weight], inputs, [scheme]) == (outlier > 1)


def test_smoothing_is_judged_by_relative_errors():
    """The factors keep the first token's 30, which a scale of 100 loses: a quarter of its product.

    The second's is 500 times larger: they cost it a three-hundredth, and without them it loses
    nothing. How large inputs are does not matter.
    """
    weight, factors = np.array([[1, 127]], np.float32), np.array([100, 1], np.float32)
    inputs = np.array([[12700, 30], [127000, 64000]], np.float32) / np.float32(1e9)
    schemes = [QuantScheme(8, None, symmetric=True)]
    assert factors_help(factors, [weight], inputs, schemes)
    assert not factors_help(factors, [weight], inputs[1:], schemes)
