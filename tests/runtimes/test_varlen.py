"""Texts without padding, as on a GPU: Triton's interpreter and plain attention stand in for it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import embedport
from embedport.checkpoint.hub import Source
from embedport.checkpoint.spec import read_spec
from embedport.errors import InputError
from embedport.runtimes import torch as adapter
from embedport.runtimes.checkpoint import has_fp8_matrices

torch = pytest.importorskip("torch")
# The interpreter takes its time.
LENGTHS = (3, 1, 6)
DTYPES = {"float16": 1e-3, "bfloat16": 8e-3}  # half a step of a value near 1


def rows_of(spec):
    generator = np.random.default_rng(7)
    return [generator.integers(0, spec.vocab_size, length) for length in LENGTHS]


def open_layers(packed, spec, dtype):
    from embedport.runtimes.packed.reading import open_checkpoint

    kind = getattr(torch, dtype)
    checkpoint = open_checkpoint(spec, kind, "cpu")
    return packed.PackedLayers(spec, kind, "cpu", checkpoint, torch.nn.functional.normalize)


def run(packed, folder, task, dtype):
    """(found, expected): packed layers' vectors, and those of transformers' layers."""
    source = folder if isinstance(folder, Source) else Source("", None, folder)
    spec = read_spec(source, task)
    rows = rows_of(spec)
    finish = torch.nn.functional.normalize
    found = open_layers(packed, spec, dtype)(np.concatenate(rows), np.array(LENGTHS))
    padded = adapter.PaddedLayers(adapter.load_layers(spec, "cpu"), "cpu", finish, spec)
    return found, padded(np.concatenate(rows), np.array(LENGTHS))


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("float16", 0.99999), pytest.param("bfloat16", 0.999, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
@pytest.mark.parametrize("geometry", ["kv1", "kv2", "kv8"])
def test_the_same_without_padding(packed, checkpoints, geometry, task, dtype, limit):
    found, expected = run(packed, checkpoints(geometry, task, dtype=dtype), task, dtype)
    assert (found * expected).sum(axis=1).min() > limit


def test_an_adapter_is_merged(packed, checkpoints, tmp_path):
    """q_proj alone is changed, and so float32 beside a stored k_proj and v_proj."""
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    generator, tensors = np.random.default_rng(3), {}
    for layer in range(2):
        prefix = f"base_model.model.layers.{layer}.self_attn.q_proj.lora_"
        for part, shape in (("A", (2, 64)), ("B", (192, 2))):
            values = generator.standard_normal(shape) / 4
            tensors[f"{prefix}{part}.weight"] = values.astype(np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    folder = checkpoints("kv2", dtype="float16")
    source = Source("", None, folder, Source("", None, tmp_path))
    found, expected = run(packed, source, "embedding", "float16")
    assert (found * expected).sum(axis=1).min() > 0.99999
    plain, _ = run(packed, folder, "embedding", "float16")
    assert (found * plain).sum(axis=1).min() < 0.99


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_fp8(packed, quantized, task):
    found, expected = run(packed, quantized("fp8", task), task, "bfloat16")
    assert (found * expected).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("lengths", [(3, 1, 6), (1, 9, 3), (8,)])
def test_long_texts_attend_one_by_one(packed, checkpoints, monkeypatch, lengths):
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(packed, "varlen_attn", None)
    monkeypatch.setattr(packed, "LONG_BACKENDS", [SDPBackend.MATH])
    for name in ("GRAPH_TOKENS", "LONG_TEXT", "LONG_STEP"):
        monkeypatch.setattr(packed, name, 4)
    spec = open_spec(checkpoints("kv2", dtype="float16"))
    ids = np.random.default_rng(7).integers(0, spec.vocab_size, sum(lengths))
    found = open_layers(packed, spec, "float16")(ids, np.array(lengths))
    finish = torch.nn.functional.normalize
    padded = adapter.PaddedLayers(adapter.load_layers(spec, "cpu"), "cpu", finish, spec)
    expected = padded(ids, np.array(lengths))
    assert (found * expected).sum(axis=1).min() > 0.99999


def test_a_long_text_does_not_see_the_next_one(packed, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    monkeypatch.setattr(packed, "LONG_STEP", 4)
    monkeypatch.setattr(packed, "LONG_TEXT", 4)
    (qkv,) = random("cpu", (10, 4 * 16))
    qkv[5:] = float("inf")
    alone = packed.attend_alone(np.array([5, 5]))
    batch = packed.unpack(torch.zeros(2 * 10 + 5, dtype=torch.int32), (10, 2, 8), alone)
    with sdpa_kernel(SDPBackend.MATH):
        found = packed.attend(qkv, (2, 1), batch)
    assert found[:5].isfinite().all()


def test_attention_is_chosen_for_the_batch_only(packed, checkpoints):
    backends = torch.backends.cuda
    order = torch._C._get_sdp_priority_order()
    layers = open_layers(packed, open_spec(checkpoints("kv2")), "bfloat16")
    layers(np.arange(4), np.array([4]))
    assert backends.math_sdp_enabled()
    assert backends.cudnn_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == order


def test_short_texts_attend_together():
    from embedport.runtimes.varlen import LONG_TEXT, attend_alone

    assert attend_alone(np.array([LONG_TEXT] * 3)) == []
    assert attend_alone(np.array([7, LONG_TEXT + 1])) == [slice(0, 7), slice(7, LONG_TEXT + 8)]


class StandIn:
    """A CUDA graph that counts; what is recorded runs at once."""

    replays = 0

    def replay(self):
        StandIn.replays += 1

    def pool(self):
        return (1, 0)


@pytest.mark.slow
def test_a_size_that_comes_back_becomes_a_graph(
    packed, tmp_path, small_tokenizer, monkeypatch, caplog
):
    import contextlib

    from tests.synthetic import Geometry, write_checkpoint

    # Triton's interpreter takes seconds for a layer.
    folder = write_checkpoint(
        tmp_path / "model", Geometry(32, 1, 2, 1, 32, 64), "embedding", small_tokenizer
    )

    seen = []

    def record(graph, *, pool, stream, capture_error_mode):
        seen.append(pool)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(StandIn, "replays", 0)
    spec = read_spec(Source("", None, folder), "embedding")
    layers = open_layers(packed, spec, "bfloat16")
    ids, one = np.arange(4), np.array([4])
    first = layers(ids, one)
    assert (seen, StandIn.replays) == ([], 0)
    for i in range(1, 4):
        np.testing.assert_array_equal(layers(ids, one), first)
        assert (seen, StandIn.replays) == ([None], i)
    layers(ids + 7, one)  # a graph reads what is put where it read before
    size = packed.round_sizes(4, 1, 4)
    expected = packed.pack(ids + 7, one, size)
    np.testing.assert_array_equal(layers._graphs[size].memory.numpy(), expected)
    for _ in range(2):
        layers(np.arange(20), np.array([20]))
    assert seen == [None, (1, 0)]  # in the memory of the first

    def fail(*args, **options):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    ids, expected = np.arange(40), None
    for _ in range(3):  # as it is, from now on
        found = layers(ids, np.array([40]))
        np.testing.assert_array_equal(found, found if expected is None else expected)
        expected = found
    assert caplog.text.count("without CUDA graphs: capture failed") == 1


def close(rows, expected, dtype):
    """Rounded once, each value to its own precision."""
    torch.testing.assert_close(rows.float(), expected, rtol=DTYPES[dtype], atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 128])
def test_add_norm(device, dtype, width):
    from embedport.runtimes.triton_kernels import add_norm

    kind = getattr(torch, dtype)
    states, delta, gains = random(device, (5, width), (5, width), (width,))
    delta, gains = delta.to(kind), gains.to(kind)
    expected = states + delta
    found = states.clone()
    rows = add_norm(found, delta, gains, 1e-6, kind)
    torch.testing.assert_close(found, expected)
    close(rows.values, rms_norm(expected, gains), dtype)
    rows = add_norm(found, None, gains, 1e-6, kind)
    torch.testing.assert_close(found, expected)
    close(rows.values, rms_norm(expected, gains), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "half"), [((4, 2), 6), ((3, 1), 8)])
def test_norm_rope(device, dtype, heads, half):
    from embedport.runtimes.triton_kernels import norm_rope

    kind, rotated = getattr(torch, dtype), sum(heads)
    qkv, *gains, angles = random(
        device, (5, (rotated + heads[1]) * 2 * half), (2 * half,), (2 * half,), (9, half)
    )
    qkv, gains = qkv.to(kind), [each.to(kind) for each in gains]
    positions = torch.tensor([0, 1, 8, 0, 3], dtype=torch.int32, device=device)
    split = qkv.view(5, -1, 2 * half).float()
    both = torch.stack([gains[0]] * heads[0] + [gains[1]] * heads[1])
    first, second = rms_norm(split[:, :rotated], both).chunk(2, dim=-1)
    cos, sin = (each[positions.long()][:, None] for each in (angles.cos(), angles.sin()))
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    values = split[:, rotated:]
    norm_rope(qkv, *gains, angles.cos(), angles.sin(), positions, heads, 1e-6)
    found = qkv.view(5, -1, 2 * half)
    close(found[:, :rotated], turned, dtype)
    torch.testing.assert_close(found[:, rotated:].float(), values, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(device, dtype):
    from embedport.runtimes.triton_kernels import silu_mul

    kind = getattr(torch, dtype)
    gate_up = random(device, (5, 96))[0].to(kind)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(silu_mul(gate_up, kind).values, torch.nn.functional.silu(gate) * up, dtype)


def test_to_fp8(device):
    from embedport.runtimes.triton_kernels import E4M3, round_rows

    values = random(device, (5, 96))[0].bfloat16()
    values[2] = 0
    rows = round_rows(values, E4M3)
    assert rows.scales is not None
    torch.testing.assert_close(rows.scales[:, 0], values.float().abs().amax(dim=1) / 448)
    scaled = values.float() / rows.scales.clamp(min=1e-30)
    expected, found = scaled.to(E4M3).float(), rows.values.float()
    assert expected.abs().max() == 448
    if device == "cuda":
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        return
    # The interpreter rounds halves up, and what comes to a power of two to half of it.
    carried = expected.abs().log2() % 1 == 0
    torch.testing.assert_close(found[~carried], expected[~carried], rtol=1 / 8, atol=0)


def random(device, *shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def rms_norm(values, gains):
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + 1e-6) * gains.float()


def test_sizes_come_back():
    from embedport.runtimes.varlen import GRAPH_TOKENS, pack, round_sizes

    for tokens in range(1, GRAPH_TOKENS + 100, 7):
        rounded, texts, longest = round_sizes(tokens, 3, 5)
        assert tokens <= rounded <= max(tokens + 15, tokens * 1.25)
        assert rounded % 16 == 0
        assert (texts, longest) == ((16, 16) if tokens <= GRAPH_TOKENS else (3, 16))
    assert round_sizes(100, 100, 1000)[2] == 1024
    assert len({round_sizes(n, 1, 1)[0] for n in range(1, GRAPH_TOKENS + 1)}) < 60
    values = pack(np.array([7, 8, 9]), np.array([2, 1]), (16, 4, 16))
    assert values.dtype == np.int32
    assert values[:4].tolist() == [7, 8, 9, 0]
    assert values[16:20].tolist() == [0, 1, 0, 0]
    assert values[32:37].tolist() == [0, 2, 3, 3, 3]
    assert values[37:].tolist() == [1, 2, 0, 0]


@pytest.fixture
def hopper(monkeypatch):
    """Every condition of `why_padded` holds but the checkpoint's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(adapter, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    return monkeypatch


def open_spec(folder):
    return read_spec(Source("", None, folder), "embedding")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (None, None),
        ("gptq", None),
        ("fp8", None),
        ("w8a8", None),
        ("bnb-nf4", None),
        ("bnb-int8", "its matrices are another library's"),
    ],
)
def test_what_is_packed(checkpoints, quantized, hopper, method, reason):
    spec = open_spec(quantized(method) if method else checkpoints("kv8"))
    assert adapter.why_padded(spec, "bf16") == reason
    assert adapter.why_padded(spec, "fp32") == "fp32 is for exactness"


def test_what_stands_in_the_way(checkpoints, quantized, hopper):
    spec, fp8 = open_spec(checkpoints("kv8")), open_spec(quantized("fp8"))
    assert "on Hopper" in str(adapter.why_padded(fp8, "fp16"))
    hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "on Hopper" in str(adapter.why_padded(fp8, "bf16"))
    assert adapter.why_padded(spec, "bf16") is None
    for name, change, reason in (
        ("capability", (torch.cuda, "get_device_capability", lambda: (7, 5)), "older than Ampere"),
        ("torch", (torch, "__version__", "2.10.1+cu128"), "torch is older than 2.11"),
        (
            "flash",
            (torch.backends.cuda, "is_flash_attention_available", lambda: False),
            "without FlashAttention",
        ),
        ("triton", (adapter, "find_spec", lambda name: None), "Triton is not installed"),
    ):
        with hopper.context() as patch:
            patch.setattr(*change)
            assert reason in str(adapter.why_padded(spec, "bf16")), name
    hopper.delenv("CC")
    hopper.setattr(adapter.shutil, "which", lambda name: None)
    assert "no C compiler" in str(adapter.why_padded(spec, "bf16"))


def test_fp8_in_blocks_of_16_only(checkpoints, hopper, tmp_path):
    """A CPU takes other sizes, too."""
    folder = tmp_path / "out"
    embedport.quantize_checkpoint(checkpoints("kv1"), folder, method="fp8")  # 200 wide inside
    assert adapter.why_padded(open_spec(folder), "bf16") == "its matrices are another library's"
    assert has_fp8_matrices(open_spec(folder))


def test_a_product_in_fp8():
    from embedport.runtimes.packed.matrices import ScaledMatrix
    from embedport.runtimes.triton_kernels import E4M3, Rows

    values, weight = (each.to(E4M3) for each in random("cpu", (5, 32), (48, 32)))
    row_scales, out_scales = (each.abs() for each in random("cpu", (5, 1), (1, 48)))
    found = ScaledMatrix(weight, out_scales)(Rows(values, row_scales), torch.bfloat16)
    expected = (values.float() * row_scales) @ (weight.float().t() * out_scales)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_text_beyond_the_positions(packed, checkpoints):
    spec = replace(open_spec(checkpoints("kv1")), max_position_embeddings=8)
    layers = open_layers(packed, spec, "bfloat16")
    with pytest.raises(InputError, match="9 tokens is longer than the model's 8 positions"):
        layers(np.arange(9), np.array([9]))


def test_fp8_in_another_form_is_left_to_its_library(quantized, copied):
    folder = copied(quantized("fp8"))
    assert has_fp8_matrices(read_spec(Source("", None, folder), "embedding"))
    config = json.loads((folder / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not has_fp8_matrices(read_spec(Source("", None, folder), "embedding"))
