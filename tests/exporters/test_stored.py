"""Checkpoints that are quantized already: GPTQ's and AWQ's codes go into a graph bit for bit."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.hub import Source
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError, InputError
from embedport.exporters.onnx import Options, estimate_onnx
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from embedport.quantize.stored import StoredWeights
from embedport.texts.samples import builtin_samples
from embedport.validation import validate

TEXTS = [sample.text for sample in builtin_samples()]
CONFIGS = {
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}


def pack(codes, bits, order=None):
    """Codes [n, m] to int32 [n, m * bits / 32], word by word as the libraries' loops do."""
    count = 32 // bits
    order = order or range(count)
    words = np.zeros((len(codes), codes.shape[1] // count), np.uint32)
    for place, column in enumerate(order):
        words |= codes[:, column::count].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def store(tensor, form):
    """A quantized matrix as AutoGPTQ, AutoAWQ or compressed-tensors writes it."""
    bits, zeros = tensor.scheme.bits, tensor.zero_points.T
    if form == "compressed-tensors":
        return {
            "weight_packed": pack(tensor.codes, bits),
            # Rows share a word here, not groups.
            "weight_zero_point": np.ascontiguousarray(pack(zeros, bits).T),
            "weight_scale": tensor.scales.astype(np.float16),
            "weight_shape": np.array(tensor.codes.shape, np.int64),
        }
    scales = np.ascontiguousarray(tensor.scales.T.astype(np.float16))
    if form == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {"qweight": pack(tensor.codes.T, 4, order), "qzeros": pack(zeros, 4, order)}
    else:
        offset = form == "gptq"
        parts = {
            "qweight": np.ascontiguousarray(pack(tensor.codes, bits).T),
            "qzeros": pack((zeros - offset) & ((1 << bits) - 1), bits),
            "g_idx": (np.arange(tensor.codes.shape[1]) // tensor.scheme.group_size).astype("int32"),
        }
    return {
        name: np.ascontiguousarray(value) for name, value in (parts | {"scales": scales}).items()
    }


@pytest.fixture(scope="session")
def stored(checkpoints, tmp_path_factory):
    """A function (form, bits, group_size, symmetric) -> (checkpoint, its quantized matrices)."""

    def make(form="gptq", bits=4, group_size=32, symmetric=False):
        folder = tmp_path_factory.mktemp(form) / "checkpoint"
        folder.mkdir()
        original = checkpoints("kv8")
        for path in original.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        (folder / "1_Pooling").mkdir()
        pooling = "1_Pooling/config.json"
        (folder / pooling).write_bytes((original / pooling).read_bytes())
        tensors, matrices = {}, {}
        for name, value in load_file(original / "model.safetensors").items():
            # One projection is left as it was.
            if "_proj" not in name or name.startswith("layers.1.mlp.up_proj"):
                tensors[name] = value
                continue
            name = name.removesuffix(".weight")
            scheme = QuantScheme(bits, group_size, symmetric)
            matrices[name] = quantize_rtn(value.astype(np.float32), scheme)
            for part, packed in store(matrices[name], form).items():
                tensors[f"{name}.{part}"] = packed
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        weights = {"num_bits": bits, "type": "int", "group_size": group_size, "strategy": "group"}
        scheme = {"targets": ["Linear"], "weights": weights | {"symmetric": symmetric}}
        sizes = {"bits": bits, "group_size": group_size}
        if form == "compressed-tensors":
            sizes = {"config_groups": {"group_0": scheme}, "ignore": ["layers.1.mlp.up_proj"]}
        change(folder, CONFIGS[form] | sizes)
        return folder, matrices

    return make


def change(folder, quantization):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | quantization
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "bits", "group_size", "symmetric"),
    [
        ("gptq", 4, 32, False),
        ("gptq", 4, 128, True),
        ("gptq", 8, 32, False),
        ("gptq_v2", 4, 64, False),
        ("awq", 4, 32, False),
        ("compressed-tensors", 4, 32, False),
        ("compressed-tensors", 4, 64, True),
        ("compressed-tensors", 8, 32, False),
    ],
)
def test_codes_are_read_bit_for_bit(stored, form, bits, group_size, symmetric):
    folder, matrices = stored(form, bits, group_size, symmetric)
    weights = StoredWeights(ModelSpec.from_checkpoint(folder))
    assert weights.schemes.keys() == matrices.keys()
    for name, expected in matrices.items():
        found = weights.read_quantized(name)
        assert found.scheme == expected.scheme
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.zero_points, expected.zero_points)
        np.testing.assert_array_equal(found.scales, expected.scales.astype(np.float16))
        rows = weights.read_fp32(f"{name}.weight", slice(3, 5))
        np.testing.assert_array_equal(rows, found.dequantize()[3:5])


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[pytest.mark.slow] if form == "gptq" else []) for form in CONFIGS],
)
def test_exported_bit_for_bit(stored, tmp_path, form):
    folder, matrices = stored(form)
    artifact = embedport.export(folder, tmp_path / "int4", precision="int4", embedding_bits=8)
    initializers = {
        name: ir.tensor(value.const_value).numpy()
        for name, value in ir.load(artifact.graph).graph.initializers.items()
        if value.const_value is not None
    }
    name = "layers.0.self_attn.q_proj"
    codes = initializers[f"{name}.codes"]
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    np.testing.assert_array_equal(nibbles, matrices[name].codes)
    expected = matrices[name].scales.astype(np.float16)
    np.testing.assert_array_equal(initializers[f"{name}.scales"], expected)
    recipe = artifact.manifest.recipe
    assert recipe is not None
    assert recipe["algorithm"] == "stored"
    assert "layers.1.mlp.up_proj" not in recipe["formats"]
    # The same codes as numbers, in an fp32 graph.
    vectors = []
    for each in (artifact, embedport.export(folder, tmp_path / "fp32")):
        embedder = embedport.load(each.folder, device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        vectors.append(embedder.encode(TEXTS))
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.999


def test_replayed_only_on_what_has_the_codes(stored, checkpoints, tmp_path):
    folder, _ = stored()
    first = embedport.export(folder, tmp_path / "first", precision="int4")
    recipe = first.folder / "embedport.json"
    again = embedport.export(folder, tmp_path / "again", recipe=recipe)
    data = [each.graph.with_name("model.onnx_data").read_bytes() for each in (first, again)]
    assert data[0] == data[1]
    with pytest.raises(InputError, match="is not quantized; give the checkpoint"):
        embedport.export(checkpoints("kv8"), tmp_path / "plain", recipe=recipe)
    with pytest.raises(InputError, match="in int4/32 from the checkpoint"):
        embedport.export(stored(group_size=64)[0], tmp_path / "other", recipe=recipe)


def test_its_own_codes_take_no_algorithm(stored, tmp_path):
    folder, _ = stored(bits=8)
    with pytest.raises(InputError, match="its own codes are taken"):
        embedport.export(folder, tmp_path / "a", precision="int8-weight", algorithm="mse")
    with pytest.raises(InputError, match=r"none of .* `calibration` and `device`"):
        embedport.export(folder, tmp_path / "a", precision="int8-weight", calibration="builtin")
    # Other precisions quantize what the codes stand for.
    artifact = embedport.export(folder, tmp_path / "b", precision="int4", algorithm="mse")
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["algorithm"] == "mse"


@pytest.mark.parametrize("is_local", [True, False])
def test_a_dry_run_takes_its_codes(stored, tmp_path, monkeypatch, is_local):
    """A hub's checkpoint too, whose weights are not fetched."""
    monkeypatch.setattr(Source, "is_local", is_local)
    estimate = estimate_onnx(stored(bits=4)[0], tmp_path / "out", Options(precision="int4"))
    assert any("the checkpoint's own codes of" in step for step in estimate.steps)
    assert not any("calibration texts" in step or "rotate" in step for step in estimate.steps)


def test_it_is_no_reference(stored, artifacts):
    with pytest.raises(CheckpointError, match="found one quantized by 'gptq'"):
        validate(artifacts("kv8").artifact.folder, stored()[0])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl2"}, "quantized by 'exl2'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "gives no weights to export"),
        ({"bits": 3}, "bits should be 4"),
        ({"bits": 4.0}, "bits should be 4 or 8, found 4.0"),
        ({"group_size": 0}, "group_size should be -1 or a number of inputs, found 0"),
        ({"group_size": 64}, r"qzeros should be I32 of shape \[2, 32\].* found I32 of \[4, 32\]"),
        ({"checkpoint_format": "marlin"}, "'gptq' or 'gptq_v2', found 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemm', found 'gemv'"),
    ],
)
def test_refused(stored, tmp_path, quantization, message):
    folder, _ = stored()
    change(folder, quantization)
    with pytest.raises(CheckpointError, match=message):
        embedport.export(folder, tmp_path / "out", precision="int4")


def test_damaged(stored, tmp_path):
    folder, _ = stored()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "layers.0.mlp.down_proj"
    order = tensors[f"{name}.g_idx"]
    for wrong, message in (
        (order + 1, r"down_proj\.g_idx should hold groups below 8, found 1 to 8"),
        (order - 1, r"down_proj\.g_idx should hold groups below 8, found -1 to 6"),
        (order[:-1].copy(), r"down_proj\.g_idx should be I32 of shape \[256\]"),
        (order.astype(np.int64), r"down_proj\.g_idx should be I32 .* found I64"),
    ):
        save_file(tensors | {f"{name}.g_idx": wrong}, path)
        with pytest.raises(CheckpointError, match=message):
            embedport.export(folder, tmp_path / "out")
    del tensors[f"{name}.qzeros"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"down_proj\.qzeros is missing"):
        embedport.export(folder, tmp_path / "out")
