"""The kernels' operators alone: heads of all sizes, and inputs that do not go together."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.runtimes.kernels import EPS, at_an_end, needs_kernels, open_session, random, run


def operator(name, feeds, outputs=1, **attributes):
    """A graph of one of the kernels' operators, without the function of its name, as bytes."""
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(each.dtype), None)
        for key, each in feeds.items()
    ]
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(name, list(feeds), names, domain="embedport", **attributes)
    types = [
        onnx.TensorProto.UINT8 if (name, i) in CODES else onnx.TensorProto.FLOAT
        for i in range(outputs)
    ]
    results = [
        helper.make_tensor_value_info(*each, None) for each in zip(names, types, strict=True)
    ]
    graph = helper.make_graph([node], "operator", inputs, results)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("embedport", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


CODES = {("AddNormQuantize", 2), ("SwigluQuantize", 1), ("QuantizeRows", 0)}


def attention_feeds(batch, size, heads, kv_heads, dim, past):
    """RotaryAttention's inputs, in their order; two tokens of the shorter row are not kept."""
    unread, shape = np.zeros(1, np.int32), (past + size, dim // 2)
    angles = random(*shape, seed=6)
    last = np.full(batch, past + size - 1, np.int32)
    last[0] -= size // 8
    return {
        "q": random(batch, size, heads * dim, seed=1),
        "k": random(batch, size, kv_heads * dim, seed=2),
        "v": random(batch, size, kv_heads * dim, seed=3),
        "v_scales": random(batch, size, 1, seed=4),
        "q_norm": random(dim, seed=5),
        "k_norm": random(dim, seed=6),
        "cosines": np.cos(angles),
        "sines": np.sin(angles),
        "small": unread == 1,
        "short": unread == 1,
        "position_ids": unread.astype(np.int64),
        "last": last,
        "total": unread,
        "lengths": unread,
        "states": random(3, kv_heads, past, dim, seed=7),
        "indices": np.array([2, 1]),
        "kept": last[:1].astype(np.int64) - 2,
    }


# A vector of sixteen, Qwen3's heads, an odd number of vectors, the most.
@needs_kernels
@pytest.mark.parametrize(("dim", "past"), [(16, 70), (128, 0), (128, 70), (208, 0), (256, 70)])
def test_sizes_of_heads(instructions, dim, past):
    """The operator alone: its rows, and the first one's keys and values."""
    batch, size, heads, kv_heads = shape = 2, 83, 4, 2
    feeds = attention_feeds(*shape, dim, past)
    options = {"epsilon": EPS, "scale": 1 / dim, "num_heads": heads, "kv_num_heads": kv_heads}
    found = run(operator("RotaryAttention", feeds, 3, **options), feeds, kernels=True)

    def rotate(x, gains):
        x = x.reshape(batch, size, -1, dim).astype(np.float64)
        front, back = np.split(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gains, 2, -1)
        c, s = (feeds[name][past:, None] for name in ("cosines", "sines"))
        return np.concatenate([front * c - back * s, back * c + front * s], -1)

    def with_past(layer, x):
        layer, x = feeds["states"][layer], x.reshape(batch, size, kv_heads, dim)
        return np.concatenate([np.stack([layer] * batch), x.swapaxes(1, 2)], 2)

    keys = with_past(2, rotate(feeds["k"], feeds["k_norm"]))
    values = with_past(1, feeds["v"] * feeds["v_scales"])
    q = rotate(feeds["q"], feeds["q_norm"]).reshape(batch, size, kv_heads, -1, dim)
    scores = np.einsum("bskgd,bktd->bkgst", q, keys) / dim
    scores[..., np.triu(np.ones((size, past + size), bool), past + 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bkgst,bktd->bskgd", weights, values).reshape(batch, size, -1)
    expected[np.arange(size) > feeds["last"][:, None] - past] = 0  # padding
    kept = feeds["kept"][0]
    for each in zip(found, (expected, keys[:1, :, :kept], values[:1, :, :kept]), strict=True):
        np.testing.assert_allclose(*each, rtol=1e-5, atol=2e-5)


# Each operator's inputs that go together, its outputs and its attributes.
ALONE: dict[str, tuple[dict[str, np.ndarray], int, dict[str, Any]]] = {
    "RotaryAttention": (
        attention_feeds(2, 5, 4, 2, 16, 3),
        3,
        {"scale": 1.0, "num_heads": 4, "kv_num_heads": 2},
    ),
    "MatMulGroups": (
        {
            "x": random(1, 3, 272),
            "codes": np.full((5, 3, 64), 255, np.uint8),
            "scales": random(5, 3),
            "zero_points": np.full((5, 2), 255, np.uint8),
        },
        1,
        {"K": 272, "N": 5, "bits": 4, "block_size": 128},
    ),
    "MatMulSymmetricGroups": (
        {
            "x": random(1, 3, 80),
            "codes": np.full((16, 3, 16), 255, np.uint8),
            "scales": random(16, 3),
        },
        1,
        {"K": 80, "N": 16, "bits": 4, "block_size": 32},
    ),
    "AddNormQuantize": (
        {
            "residual": random(1, 3, 31),
            "value": random(1, 3, 31),
            "scales": random(1, 3, 1),
            "gains": random(31),
        },
        4,
        {},
    ),
    "SwigluQuantize": (
        {"gate": random(1, 3, 31), "scales": random(1, 3, 1), "up": random(1, 3, 31)},
        3,
        {},
    ),
    "AddNorm": (
        {"residual": random(1, 3, 31), "gains": random(31), "value": random(1, 3, 31)},
        2,
        {},
    ),
    "Swiglu": ({"gate": random(1, 3, 31), "up": random(1, 3, 31)}, 1, {}),
    "QuantizeRows": ({"x": random(1, 3, 31)}, 2, {}),
    "CosSin": ({"angles": random(1, 3, 31)}, 2, {}),
}


def groups_of(size):
    """Weights in other groups: the shapes go together."""
    count = -(-272 // size)
    shapes = {"codes": (5, count, size // 2), "zero_points": (5, -(-count // 2))}
    codes = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
    return {"block_size": size, "scales": random(5, count)} | codes


# Changes to them that do not go with the others: another shape, value or attribute.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("RotaryAttention", change)
        for change in (
            {"q": random(2, 5, 63)},
            {"k": random(2, 5, 31)},
            {"v": random(2, 5, 31)},
            {"v_scales": random(2, 2, 1)},
            {"k_norm": random(15)},
            {"cosines": random(7, 8)},
            {"sines": random(7, 8)},
            {"last": np.array([7], np.int32)},
            {"last": np.array([7, 2], np.int32)},
            {"last": np.array([7, 8], np.int32)},
            {"states": random(3, 2, 3, 15)},
            {"indices": np.array([0])},
            {"indices": np.array([3, 0])},
            {"indices": np.array([-1, 0])},
            {"indices": np.array([0, 3])},
            {"indices": np.array([0, -1])},
            {"kept": np.array([-1])},
            {"kept": np.array([9])},
            {"num_heads": 3},
            {"num_heads": 0, "q": random(2, 5, 0)},
            {"kv_num_heads": 0},
            {"kv_num_heads": 3} | attention_feeds(2, 5, 4, 3, 16, 3),
            *(attention_feeds(2, 5, 4, 2, dim, 3) for dim in (8, 24, 272)),
        )
    ),
    *(
        ("MatMulGroups", change)
        for change in (
            {"x": random(1, 3, 271)},
            {"x": random(1, 1, 1, 3, 272)},
            {"codes": np.zeros((5, 3, 63), np.uint8)},
            {"scales": random(5, 2)},
            {"zero_points": np.zeros((5, 1), np.uint8)},
            {"K": 0, "x": random(1, 3, 0)},
            {"block_size": 0},
            {"N": 0},
            {"N": 6},
            {"bits": 2, "codes": np.zeros((5, 3, 32), np.uint8)},
            {"bits": 8, "codes": np.zeros((5, 3, 128), np.uint8)},
            *(groups_of(size) for size in (16, 48, 256)),
        )
    ),
    ("AddNormQuantize", {"residual": random(3, 31)}),
    ("AddNormQuantize", {"value": random(1, 3, 30)}),
    ("AddNormQuantize", {"scales": random(1, 2, 1)}),
    ("AddNormQuantize", {"gains": random(30)}),
    ("SwigluQuantize", {"scales": random(1, 2, 1)}),
    ("SwigluQuantize", {"up": random(1, 3, 30)}),
    ("SwigluQuantize", {name: np.zeros((1, 3, 65537), np.float32) for name in ("gate", "up")}),
    ("AddNorm", {"gains": random(30)}),
    ("AddNorm", {"value": random(1, 3, 30)}),
    ("Swiglu", {"gate": random(3, 31)}),
    ("Swiglu", {"up": random(1, 3, 30)}),
    ("QuantizeRows", {"x": random(3, 31)}),
    ("CosSin", {"angles": random(1, 1, 1, 3, 31)}),
]


@needs_kernels
class TestOperatorsAlone:
    @pytest.mark.parametrize("name", ALONE)
    def test_accepted(self, name):
        """Nor is anything written beyond a result's end."""
        feeds, outputs, attributes = ALONE[name]
        graph = operator(name, feeds, outputs, **attributes)
        results = run(graph, feeds, kernels=True)
        session = open_session(graph, kernels=True)
        binding, places = session.io_binding(), [at_an_end(0 * each) for each in results]
        for key, value in feeds.items():
            binding.bind_cpu_input(key, value)
        for i, place in enumerate(places):
            binding.bind_ortvalue_output(f"y{i}", onnxruntime.OrtValue.ortvalue_from_numpy(place))
        session.run_with_iobinding(binding)
        assert all(map(np.array_equal, places, results))

    @pytest.mark.parametrize(("name", "change"), REFUSED)
    def test_refused(self, name, change):
        """Before anything is read that is not there."""
        feeds, outputs, attributes = ALONE[name]
        feeds = feeds | {key: each for key, each in change.items() if key in feeds}
        attributes = attributes | {key: each for key, each in change.items() if key not in feeds}
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            run(operator(name, feeds, outputs, **attributes), feeds, kernels=True)
