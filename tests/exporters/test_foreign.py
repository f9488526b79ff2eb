"""Checkpoints that other libraries quantized, against what these make of their own codes."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError
from embedport.quantize.stored import StoredWeights
from tests.conftest import DATA
from tests.foreign import (
    GEOMETRY,
    GPTQ,
    IGNORED,
    MATRIX,
    assert_alike,
    set_config,
    tensors_of,
    vectors,
)
from tests.synthetic import write_checkpoint

# Cases of tests/data/quantized, and whether their codes go into a graph as they are.
RECORDED = {
    ("gptqmodel", "act-order"): False,
    ("gptqmodel", "act-order-v2"): False,
    ("gptqmodel", "act-order-8"): False,
    ("gptqmodel", "row"): True,
    ("gptqmodel", "row-8-act-order"): True,  # one group
    ("gptqmodel", "ordered"): True,
    ("auto-round", "symmetric"): True,
    ("auto-round", "asymmetric"): True,
    ("auto-round", "gptqmodel"): True,
    ("auto-round", "row-8"): True,
    ("auto-round", "mixed"): True,
    ("compressed-tensors-0.12", "group"): False,
    ("compressed-tensors-0.12", "group-asymmetric"): False,
}


def recorded(library, case):
    """(quantization_config, the parts of one matrix, its values as the library unpacks them)."""
    with np.load(DATA / "quantized" / f"{library}.npz") as file:
        parts = {
            name.removeprefix(f"{case}/"): file[name]
            for name in file.files
            if name.startswith(f"{case}/")
        }
    config = json.loads(bytes(parts.pop("config")))
    return config, parts, parts.pop("expected")


@pytest.mark.parametrize(("library", "case"), RECORDED)
def test_recorded(with_matrix, library, case):
    """Numbers that GPTQModel, AutoRound and an older compressed-tensors unpacked, bit for bit."""
    config, parts, expected = recorded(library, case)
    folder = with_matrix(parts, config)
    weights = StoredWeights(ModelSpec.from_checkpoint(folder))
    assert weights.formats.keys() == {MATRIX}
    assert (weights.schemes.keys() == {MATRIX}) == RECORDED[library, case]
    # Each library multiplies in its own 16 bits; products of codes and scales are exact in fp32.
    dtype = ml_dtypes.bfloat16 if library.startswith("compressed") else np.float16
    found = weights.read_fp32(f"{MATRIX}.weight")
    np.testing.assert_array_equal(found.astype(dtype), expected.astype(dtype))
    rows = weights.read_fp32(f"{MATRIX}.weight", slice(3, 7))
    np.testing.assert_array_equal(rows, found[3:7])
    if RECORDED[library, case]:  # in a graph's groups, too
        np.testing.assert_array_equal(weights.read_quantized(MATRIX).dequantize(), found)


@pytest.mark.parametrize(
    ("library", "case"), [("gptqmodel", "act-order"), ("auto-round", "asymmetric")]
)
def test_recorded_runs(with_matrix, tmp_path, library, case):
    """The whole model gives what it gives with the numbers that the library unpacked."""
    config, parts, expected = recorded(library, case)
    folder = with_matrix(parts, config)
    reference = with_matrix({"weight": expected.astype(np.float32)})
    assert_alike(vectors(folder), vectors(reference), 0.9999)  # in bf16
    exported = vectors(embedport.export(folder, tmp_path / "fp32").folder)
    assert_alike(exported, vectors(embedport.export(reference, tmp_path / "plain").folder))


@pytest.mark.parametrize(("case", "bits"), [("act-order-v2", 4), ("act-order-8", 8)])
def test_zero_points_of_zero(with_matrix, case, bits):
    """GPTQModel writes "gptq" by a subtraction of whole words: 0 borrows from its neighbour.

    gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module and its inverse.
    """
    config, parts, _ = recorded("gptqmodel", case)
    ones = np.uint32(0x11111111 if bits == 4 else 0x01010101)
    words = parts["qzeros"].view(np.uint32)
    if config["checkpoint_format"] == "gptq":
        words = words + ones
    words = words & ~np.uint32(0xF0000F if bits == 4 else 0xFF)  # two of eight, or one of four

    def values(form, stored):
        changed = parts | {"qzeros": stored.view(np.int32)}
        both = {"checkpoint_format": form, "format": form}
        spec = ModelSpec.from_checkpoint(with_matrix(changed, config | both))
        return StoredWeights(spec).read_fp32(f"{MATRIX}.weight")

    np.testing.assert_array_equal(values("gptq", words - ones), values("gptq_v2", words))


def test_act_order_is_quantized_again(with_matrix, tmp_path, caplog):
    """`precision` int4 of codes that a graph cannot take: rounded anew, which is said."""
    config, parts, expected = recorded("gptqmodel", "act-order")
    folder = with_matrix(parts, config)
    with caplog.at_level(logging.WARNING):
        artifact = embedport.export(folder, tmp_path / "int4", precision="int4", fast=True)
    assert "inputs in another order (act-order)) are unpacked and quantized again" in caplog.text
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["algorithm"] == "rtn"
    reference = with_matrix({"weight": expected.astype(np.float32)})
    same = embedport.export(reference, tmp_path / "plain", precision="int4", fast=True)
    assert_alike(vectors(artifact.folder), vectors(same.folder))
    # Its configuration promises no codes, so another algorithm may be asked for.
    embedport.export(folder, tmp_path / "mse", precision="int4", algorithm="mse")


def test_static_groups_are_taken(with_matrix, tmp_path):
    """Codes are kept if act-order leaves the groups in order (static_groups)."""
    config, parts, _ = recorded("gptqmodel", "ordered")
    folder = with_matrix(parts, config | {"desc_act": True, "static_groups": True})
    artifact = embedport.export(folder, tmp_path / "int4", precision="int4")
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["algorithm"] == "stored"
    assert artifact.manifest.recipe["formats"][MATRIX] == "int4/32"


@pytest.mark.parametrize("block", [[16, 32], None])
@pytest.mark.parametrize("scales", ["float32", "bfloat16"])
def test_fine_grained_fp8(plain, tmp_path, block, scales):
    """The official -FP8 form, by transformers' own two operations."""
    import torch
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=block)

    folder = shutil.copytree(plain, tmp_path / "fp8")
    tensors, expected = load_torch(plain / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name and not name.startswith(IGNORED)]:
        parts = Fp8Quantize(Quantizer())._quantize_one(name, tensors[name])
        codes, inverse = parts[name], parts[f"{name}_scale_inv"].to(getattr(torch, scales))
        inverse = inverse if block else inverse.reshape(())
        tensors |= {name: codes, f"{name}_scale_inv": inverse}
        expected[name] = Fp8Dequantize(Quantizer())._dequantize_one(codes, inverse, torch.float32)
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    set_config(folder, config | {"weight_block_size": block})
    weights = StoredWeights(ModelSpec.from_checkpoint(folder))
    assert len(expected) == len(weights.formats) == 6
    for name, values in expected.items():
        np.testing.assert_array_equal(weights.read_fp32(name), values.numpy())
    if block and scales == "bfloat16":  # as Qwen3's are
        model = embedport.load(folder, device="cpu")
        assert model.precision.startswith("fp8")
        tensors |= expected
        save_torch(
            {name: value.contiguous() for name, value in tensors.items() if "_inv" not in name},
            folder / "model.safetensors",
        )
        exported = vectors(embedport.export(folder, tmp_path / "int8", precision="fp32").folder)
        assert_alike(vectors(folder), exported, 0.999)


@pytest.mark.parametrize(
    ("library", "case", "part", "message"),
    [
        ("auto-round", "mixed", "scales", r"scales should be .* of shape \[2, 32\] by config"),
        ("gptqmodel", "act-order", "g_idx", r"g_idx should hold groups below 4, found 0 to 300"),
        ("compressed-tensors-0.12", "group", "weight_g_idx", "should hold groups below 4"),
        ("compressed-tensors-0.12", "group", "weight_packed", r"should be I32 of shape \[32, 16\]"),
    ],
)
def test_damaged(with_matrix, library, case, part, message):
    config, parts, _ = recorded(library, case)
    parts[part] = np.where(parts[part] == parts[part].max(), 300, parts[part]).astype(
        parts[part].dtype
    )
    if "idx" not in part:
        parts[part] = np.ascontiguousarray(parts[part][:, 1:])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))


@pytest.mark.parametrize(
    ("library", "case", "missing"),
    [
        ("gptqmodel", "act-order", "g_idx"),
        ("compressed-tensors-0.12", "group", "weight_g_idx"),
        ("compressed-tensors-0.12", "group-asymmetric", "weight_zero_point"),
    ],
)
def test_incomplete(with_matrix, library, case, missing):
    """A part that the configuration promises, and without which other numbers would come."""
    config, parts, _ = recorded(library, case)
    del parts[missing]
    message = rf"down_proj\.{missing} is missing beside {MATRIX}"
    with pytest.raises(CheckpointError, match=message):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))


def test_contradictions(with_matrix):
    """Tensors that say other than config.json: none is left out without a word."""
    config, parts, _ = recorded("compressed-tensors-0.12", "group-asymmetric")
    weights = config["config_groups"]["group_0"]["weights"]
    symmetric = tensors_of(**weights | {"symmetric": True})
    with pytest.raises(CheckpointError, match=r"weight_zero_point should be absent or all 0, sin"):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, symmetric))).read_fp32(
            f"{MATRIX}.weight"
        )
    plain = {"weight": np.ones((32, 128), np.float32)}
    with pytest.raises(CheckpointError, match=r"down_proj is there twice, as .*weight_packed and"):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts | plain, config)))
    # Not compressed: its library rounds the weight by these scales when it computes.
    frozen = {"weight": np.ones((32, 128), np.float32), "weight_scale": parts["weight_scale"]}
    message = r"down_proj\.weight_scale is part of a quantized matrix, in a form other than .*int4"
    with pytest.raises(CheckpointError, match=message):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(frozen, tensors_of())))


def test_integers_beyond_their_bits(with_matrix):
    """Four bits in a byte each: 9 would be the code of -7."""
    codes = np.zeros((32, 128), np.int8)
    parts = {"weight": codes, "weight_scale": np.ones((32, 4), np.float32)}
    config = tensors_of() | {"format": "int-quantized"}
    folder = with_matrix(parts, config)
    assert not StoredWeights(ModelSpec.from_checkpoint(folder)).read_fp32(f"{MATRIX}.weight").any()
    codes[3, 4] = 9
    weights = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    with pytest.raises(CheckpointError, match=r"should hold integers of 4 bits .* found 0 to 9"):
        weights.read_fp32(f"{MATRIX}.weight")


def test_an_order_that_is_none(with_matrix):
    """compressed-tensors fills g_idx with -1 where the inputs are in order."""
    config, parts, _ = recorded("compressed-tensors-0.12", "group")
    parts["weight_g_idx"][:] = -1
    found = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    assert found.schemes.keys() == {MATRIX}
    parts["weight_g_idx"][:] = np.arange(128) // 32
    ordered = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    values, expected = (each.read(f"{MATRIX}.weight") for each in (found, ordered))
    np.testing.assert_array_equal(values, expected)


def test_what_is_not_quantized_is_checked_too(with_matrix):
    config, parts, _ = recorded("gptqmodel", "ordered")
    folder = with_matrix(parts, config)
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][1:].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight should have shape \[32\]"):
        StoredWeights(ModelSpec.from_checkpoint(folder))


def test_groups_that_differ_in_zero_points(with_matrix):
    """Each matrix has the group whose parts are there, in any order of the groups."""
    config, parts, expected = recorded("compressed-tensors-0.12", "group-asymmetric")
    (asymmetric,) = config["config_groups"].values()
    symmetric = asymmetric | {"weights": asymmetric["weights"] | {"symmetric": True}}
    config["config_groups"] = {"group_0": symmetric, "group_1": asymmetric}
    weights = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    found = weights.read_fp32(f"{MATRIX}.weight").astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def groups_of(*weights):
    """A configuration with a code a byte, and a group of matrices for each form of weights."""
    config = tensors_of() | {"format": "int-quantized"}
    groups = (tensors_of(**each)["config_groups"]["group_0"] for each in weights)
    return config | {"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}}


@pytest.mark.parametrize("widths", [(4, 8), (8, 4)])
def test_groups_that_differ_in_bits(with_matrix, widths):
    """W4A8 of some matrices and W8A8 of others: both have a byte for each code."""
    codes = np.arange(32 * 128, dtype=np.int16).astype(np.int8).reshape(32, 128)
    parts = {"weight": codes, "weight_scale": np.ones((32, 4), np.float32)}
    config = groups_of(*({"num_bits": width} for width in widths))
    weights = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    np.testing.assert_array_equal(weights.read(f"{MATRIX}.weight"), codes)


@pytest.mark.parametrize(("height", "is_clear"), [(24, False), (16, True)])
def test_groups_that_differ_in_blocks(with_matrix, height, is_clear):
    """32 rows have two scales in blocks of 24 rows and in blocks of 16, for other rows each."""
    scales = np.arange(8, dtype=np.float32).reshape(2, 4)
    parts = {"weight": np.ones((32, 128), np.int8), "weight_scale": scales}
    blocks = [[height, 32], [16, 32], [40, 32]]
    kind = {"num_bits": 8, "strategy": "block", "group_size": None}
    config = groups_of(*(kind | {"block_structure": block} for block in blocks))
    spec = ModelSpec.from_checkpoint(with_matrix(parts, config))
    if is_clear:
        found = StoredWeights(spec).read(f"{MATRIX}.weight")
        np.testing.assert_array_equal(found[::16, ::32], scales)
        return
    with pytest.raises(CheckpointError, match=r"down_proj fit several .* 24 outputs .* 16 outputs"):
        StoredWeights(spec)


def test_group_sizes_of_as_many_groups(with_matrix):
    """128 inputs are two groups of 64 and two of 96, one shorter: g_idx tells."""
    config, parts, _ = recorded("gptqmodel", "ordered")
    parts |= {"scales": parts["scales"][:2].copy(), "qzeros": parts["qzeros"][:2].copy()}
    config |= {"group_size": 64, "dynamic": {".*down_proj": {"group_size": 96}}}
    order = np.arange(128, dtype=np.int32) // 96
    spec = ModelSpec.from_checkpoint(with_matrix(parts | {"g_idx": order}, config))
    found = StoredWeights(spec).read(f"{MATRIX}.weight")
    alone = config | {"group_size": 96, "dynamic": {}}
    del parts["g_idx"]
    expected = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, alone)))
    np.testing.assert_array_equal(found, expected.read(f"{MATRIX}.weight"))
    with pytest.raises(CheckpointError, match=r"fit several .* 64 inputs .* 96 inputs .* do not"):
        StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))


def test_no_quantization_config(with_matrix):
    """Only quantize_config.json, say: AutoGPTQ's own file."""
    _, parts, _ = recorded("gptqmodel", "ordered")
    message = (
        r"missing from model\.safetensors, which has .*down_proj\.qweight.*quantization_config"
    )
    with pytest.raises(CheckpointError, match=message):
        vectors(with_matrix(parts))


def test_two_configurations(with_matrix):
    """GPTQModel reads quantize_config.json, transformers config.json."""
    config, parts, _ = recorded("gptqmodel", "ordered")
    folder = with_matrix(parts, config)
    other = folder / "quantize_config.json"
    other.write_text(json.dumps({"bits": 4, "group_size": 32}))  # AutoGPTQ's: "gptq", too
    ModelSpec.from_checkpoint(folder)
    other.write_text(json.dumps(config | {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}))
    with pytest.raises(
        CheckpointError, match=r"quantize_config\.json: .* is 'gptq_v2', in .*'gptq'"
    ):
        ModelSpec.from_checkpoint(folder)


def test_a_quantized_head(tmp_path, small_tokenizer):
    """It is not passed over for the embedding table, to which config.json ties it."""
    folder = write_checkpoint(tmp_path / "reranker", GEOMETRY, "reranker", small_tokenizer)
    tensors = load_file(folder / "model.safetensors")
    _, parts, _ = recorded("gptqmodel", "ordered")
    tensors |= {f"lm_head.{part}": value for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, GPTQ | {"lm_head": True})
    with pytest.raises(CheckpointError, match="lm_head is quantized, and only projections"):
        embedport.load(folder, device="cpu")


def test_scales_beyond_fp16(with_matrix):
    """Said of the tensor, not of a result."""
    config, parts, _ = recorded("gptqmodel", "ordered")
    parts["scales"][0, 0] = np.inf
    weights = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    with pytest.raises(CheckpointError, match=r"down_proj\.scales should be finite, found NaN or"):
        weights.read(f"{MATRIX}.weight")
