"""Weights that stay quantized on a GPU: kernels in Triton's interpreter, layers on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import embedport
from embedport.checkpoint.hub import Source
from embedport.checkpoint.spec import read_spec
from embedport.checkpoint.tensor_files import read_headers
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from embedport.quantize.stored import find_stored
from embedport.runtimes import torch as adapter
from embedport.runtimes.checkpoint import load_base
from tests.runtimes.test_varlen import LENGTHS, open_layers, rows_of
from tests.synthetic import Geometry, edit, round_to_nearest, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
COMPILE = Path(__file__).parent / "compile_packed.py"
DTYPES = (torch.float16, torch.bfloat16)


def random(device, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device)


def make_packed(device, dtype, bits, group, form, shape=(40, 144)):
    """(a packed matrix of random weights, its values float32 [out, in] by the quantizer)."""
    from embedport.runtimes.packed.matrices import PackedMatrix, pack

    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    buffer = torch.empty(shape[0] * shape[1] + 7, dtype=dtype, device=device)
    if form == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data, state = quantize_4bit(
            torch.from_numpy(weight), blocksize=group, quant_type="nf4", compress_statistics=False
        )
        stored = data.view(shape[0], -1)
        codes = torch.stack([stored >> 4, stored & 15], dim=2).flatten(1)
        scales = state.absmax.view(shape[0], -1).t().contiguous()
        expected = dequantize_4bit(data, state)
        zeros, levels = None, state.code
    else:
        tensor = quantize_rtn(weight, QuantScheme(bits, group, form == "symmetric", "bfloat16"))
        codes, expected = torch.from_numpy(tensor.codes), torch.from_numpy(tensor.dequantize())
        scales = torch.from_numpy(tensor.scales).t().bfloat16().contiguous()
        zeros = torch.from_numpy(tensor.zero_points).t().contiguous()
        zeros, levels = None if form == "symmetric" else zeros.to(device), None
    matrix = PackedMatrix(
        pack(codes.to(device), bits, group),
        scales.to(device),
        zeros,
        None if levels is None else levels.to(device),
        bits,
        group,
        shape[1],
        buffer,
    )
    return matrix, expected.to(device)


def unpacked(matrix):
    """A packed matrix's values in plain torch, float32 [out, in]."""
    parts = matrix.codes.view(len(matrix.codes), len(matrix.scales), -1)
    if matrix.bits == 4:
        parts = torch.cat([parts & 15, parts >> 4], dim=2)
    scales = matrix.scales.t().float()[:, :, None]
    if matrix.levels is not None:
        values = matrix.levels[parts.long()] * scales
    else:
        middle = 1 << (matrix.bits - 1)
        zeros = middle if matrix.zeros is None else matrix.zeros.t().float()[:, :, None]
        values = (parts.float() - zeros) * scales
    return values.flatten(1)[:, : matrix.width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group", "form", "shape"),
    [
        (4, 32, "asymmetric", (40, 144)),  # the last group has 16 inputs
        (4, 128, "symmetric", (40, 144)),
        (4, 64, "nf4", (24, 128)),
        (8, 32, "asymmetric", (24, 80)),
        (8, 128, "symmetric", (24, 80)),
    ],
)
def test_packed_products(device, dtype, bits, group, form, shape):
    """Unpacked inside the product, and before it: what the quantizer's own values give."""
    from embedport.runtimes.packed import kernels, matrices
    from embedport.runtimes.triton_kernels import Rows

    if (device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as integers")
    matrix, expected = make_packed(device, dtype, bits, group, form, shape)
    torch.testing.assert_close(unpacked(matrix), expected, rtol=1e-6, atol=1e-7)
    x = random(device, 5, shape[1]).to(dtype)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    kernels.unpack(matrix, out)
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)
    product = x.float() @ out.float().t()
    limits = {"rtol": 2**-7, "atol": 2e-2}
    torch.testing.assert_close(matrix(Rows(x), dtype).float(), product, **limits)
    many = x.repeat(matrices.FUSED_TOKENS, 1)
    found = matrix(Rows(many), dtype).float()
    torch.testing.assert_close(found, product.repeat(matrices.FUSED_TOKENS, 1), **limits)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability):
    """For GPUs that are not here: Triton's compiler and ptxas take every kernel."""
    command = [sys.executable, str(COMPILE), str(capability)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["tensor", "cores", "in", "7", "of", "7", "products"]


def test_int8_products(device):
    """Integer sums are exact; the scales of tokens and channels are applied once, behind."""
    from embedport.runtimes.packed.matrices import ScaledMatrix
    from embedport.runtimes.triton_kernels import round_rows

    values = random(device, 19, 80).bfloat16()
    values[3] = 0
    rows = round_rows(values, torch.int8)
    assert rows.scales is not None
    largest = values.float().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(rows.scales, largest / 127)
    expected = torch.round(values.float() / rows.scales.clamp(min=1e-30)).to(torch.int8)
    assert (rows.values.int() - expected.int()).abs().max() <= 1  # a division's last bit
    assert (rows.values != expected).float().mean() < 0.01
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-127, 128, (136, 80), generator=generator, dtype=torch.int8).to(device)
    scales = random(device, 1, 136).abs()
    found = ScaledMatrix(weight, scales)(rows, torch.float16)
    sums = (rows.values.double() @ weight.double().t()).float()
    torch.testing.assert_close(found, (sums * rows.scales * scales).half(), rtol=0, atol=0)


def test_matrices_of_one_form_are_one_product():
    from embedport.runtimes.packed.matrices import PackedMatrix, PlainMatrix, StackedMatrix, stack
    from embedport.runtimes.triton_kernels import Rows

    dtype = torch.float16
    first, _ = make_packed("cpu", dtype, 4, 32, "asymmetric", (16, 64))
    second, _ = make_packed("cpu", dtype, 4, 32, "symmetric", (32, 64))
    wide, _ = make_packed("cpu", dtype, 4, 64, "symmetric", (16, 64))
    both = stack([first, second])
    assert isinstance(both, PackedMatrix)
    values = torch.cat([unpacked(first), unpacked(second)])
    torch.testing.assert_close(unpacked(both), values, rtol=0, atol=0)
    nf4, _ = make_packed("cpu", dtype, 4, 32, "nf4", (16, 64))
    assert nf4.levels is not None
    assert isinstance(stack([nf4, nf4]), PackedMatrix)
    other = replace(nf4, levels=nf4.levels.flip(0))
    assert isinstance(stack([nf4, other]), StackedMatrix)  # a product has one table of levels
    if torch.cuda.is_available():
        return
    mixed = stack([first, wide, PlainMatrix(unpacked(second).to(dtype))])
    assert isinstance(mixed, StackedMatrix)
    rows = Rows(random("cpu", 3, 64).to(dtype))
    values = torch.cat([unpacked(first), unpacked(wide), unpacked(second)])
    expected = rows.values.float() @ values.to(dtype).float().t()
    torch.testing.assert_close(mixed(rows, dtype).float(), expected, rtol=2**-7, atol=2e-2)


@pytest.fixture(scope="module")
def small(tmp_path_factory, small_tokenizer):
    """A function (method) -> a checkpoint of one layer: Triton's interpreter takes its time."""
    geometry = Geometry(64, 1, 2, 1, 32, 64)
    source = write_checkpoint(
        tmp_path_factory.mktemp("packed") / "source", geometry, "embedding", small_tokenizer
    )

    def make(method):
        out = tmp_path_factory.mktemp("packed") / "checkpoint"
        if method in ("gptq", "awq"):
            return round_to_nearest(source, out, method, group_size=32)
        if method.endswith("in part"):
            return keep_one(make(method.removesuffix(" in part")), source, out)
        name, _, double = method.partition(" ")
        fast, double_quant = name in ("bnb-nf4", "w8a8"), bool(double)
        return embedport.quantize_checkpoint(
            source, out, method=name, fast=fast, double_quant=double_quant
        ).folder

    return make


def keep_one(folder, source, out):
    """A copy of a checkpoint with one projection as it was, as lists of exceptions leave them."""
    from safetensors.torch import load_file, save_file

    kept = "layers.0.self_attn.v_proj"
    shutil.copytree(folder, out)
    tensors = {
        name: tensor
        for name, tensor in load_file(out / "model.safetensors").items()
        if not name.startswith(f"{kept}.")
    }
    tensors[f"{kept}.weight"] = load_file(source / "model.safetensors")[f"{kept}.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "bitsandbytes":
        config["llm_int8_skip_modules"] = [kept]
    edit(out / "config.json", quantization_config=config)
    (out / "embedport.json").unlink(missing_ok=True)
    return out


@pytest.mark.parametrize(
    "method",
    [
        "awq in part",
        "w8a8",
        pytest.param("bnb-nf4 double in part", marks=pytest.mark.slow),
        pytest.param("awq", marks=pytest.mark.slow),
        pytest.param("gptq", marks=pytest.mark.slow),
        pytest.param("bnb-nf4", marks=pytest.mark.slow),
    ],
)
def test_layers(small, packed, monkeypatch, method):
    """The vectors of the unpacked weights, in 1.1 times the checkpoint's memory at most."""
    from embedport.runtimes.packed import matrices

    folder = small(method)
    spec = read_spec(Source("", None, folder), "embedding")
    layers = open_layers(packed, spec, "float16")
    rows = rows_of(spec)
    ids, lengths = np.concatenate(rows), np.array(LENGTHS)
    found = layers(ids, lengths)
    plain = replace(spec, quantization=find_stored(spec)) if method == "w8a8" else spec
    base, finish = load_base(plain, torch.float32, "cpu"), torch.nn.functional.normalize
    if method == "w8a8":
        for module in base.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(round_tokens)
    expected = adapter.PaddedLayers(base, "cpu", finish, spec)(ids, lengths)
    assert (found * expected).sum(axis=1).min() > 0.9999
    monkeypatch.setattr(matrices, "FUSED_TOKENS", 0)
    assert (layers(ids, lengths) * found).sum(axis=1).min() > 0.9999
    stored = sum(info.nbytes for info in read_headers(folder).values())
    assert weight_bytes(layers) <= 1.1 * stored


def round_tokens(module, inputs):
    """A token's activations in 8 bits, as servers' kernels round them: max|x| / 127."""
    (x,) = inputs
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return (torch.round(x / scales) * scales,)


def weight_bytes(layers):
    total = layers._table.nbytes + layers._norm.nbytes
    for layer in layers._layers:
        gains = (layer.input_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
        matrices = (layer.qkv, layer.out, layer.gate_up, layer.down)
        total += sum(gain.nbytes for gain in gains) + sum(map(matrix_bytes, matrices))
    return total


def matrix_bytes(matrix):
    """Bytes of a matrix's tensors, without the buffer that matrices share."""
    parts = {name: part for name, part in vars(matrix).items() if name != "buffer"}
    stacked = sum(map(matrix_bytes, parts.pop("parts", ())))
    return stacked + sum(part.nbytes for part in parts.values() if isinstance(part, torch.Tensor))
