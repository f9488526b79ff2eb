"""Checkpoints that other libraries quantized, against what these make of their own codes."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import embedport
from embedport.checkpoint.quantization_config import (
    LibraryQuantization,
    StoredQuantization,
    read_quantization,
)
from embedport.checkpoint.spec import ModelSpec
from embedport.cli import main
from embedport.errors import CheckpointError
from embedport.quantize.stored import StoredWeights
from embedport.texts.samples import builtin_samples
from tests.conftest import DATA
from tests.synthetic import Geometry, write_checkpoint

TEXTS = [sample.text for sample in builtin_samples()][:8]
GEOMETRY = Geometry(32, 1, 2, 2, 16, 128)
MATRIX = "layers.0.mlp.down_proj"
IGNORED = "layers.0.self_attn.v_proj"
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_tokenizer):
    """A checkpoint of one layer, in bf16."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return write_checkpoint(folder, GEOMETRY, "embedding", small_tokenizer)


@pytest.fixture
def with_matrix(plain, tmp_path):
    """A function (parts of down_proj, quantization_config) -> the checkpoint with them."""

    def make(parts, config=None):
        folder = shutil.copytree(plain, tmp_path / f"made-{len(list(tmp_path.iterdir()))}")
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{MATRIX}.weight"]
        tensors |= {f"{MATRIX}.{part}": value for part, value in parts.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            set_config(folder, config)
        return folder

    return make


def set_config(folder, config):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(values))


def vectors(folder):
    model = embedport.load(folder, device="cpu")
    assert isinstance(model, embedport.Embedder)
    return model.encode(TEXTS)


def assert_alike(found, expected, limit=0.99999):
    assert (found * expected).sum(axis=1).min() > limit


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


def schemes():
    """compressed-tensors' presets at the size of the small model."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    def preset(name, *, inputs=None, **weights):
        scheme = preset_name_to_scheme(name, ["Linear"])
        assert scheme.weights is not None
        args = QuantizationArgs(**(scheme.weights.model_dump() | weights))
        activations = scheme.input_activations
        if activations is not None and inputs is not None:
            activations = QuantizationArgs(**(activations.model_dump() | inputs))
        return scheme.model_copy(update={"weights": args, "input_activations": activations})

    block = {"block_structure": [16, 32], "inputs": {"group_size": 32}}
    both = (preset("FP8_DYNAMIC"), preset("W4A16", group_size=32))
    return {
        "W4A16": (preset("W4A16", group_size=32),),
        "W4A16_ASYM": (preset("W4A16_ASYM", group_size=32),),
        "W4A16 by channel": (preset("W4A16", group_size=None, strategy="channel"),),
        "actorder weight": (preset("W4A16", group_size=32, actorder="weight"),),
        "actorder static": (preset("W4A16_ASYM", group_size=32, actorder="static"),),
        "W8A16": (preset("W8A16", group_size=None, strategy="channel"),),
        "W8A16 asymmetric": (
            preset("W8A16", group_size=None, strategy="channel", symmetric=False),
        ),
        "W4AFP8": (preset("W4AFP8", group_size=32),),
        "W8A8": (preset("W8A8"),),
        "W8A8 asymmetric": (preset("W8A8", symmetric=False),),
        "FP8": (preset("FP8"),),
        "FP8_DYNAMIC": (preset("FP8_DYNAMIC"),),
        "FP8_BLOCK": (preset("FP8_BLOCK", **block),),
        "FP8_BLOCK, uneven": (preset("FP8_BLOCK", **block | {"block_structure": [24, 32]}),),
        "NVFP4": (preset("NVFP4"),),
        "NVFP4A16": (preset("NVFP4A16"),),
        "mixed": (
            both[0].model_copy(update={"targets": ["re:.*down_proj"]}),
            both[1].model_copy(update={"targets": ["re:.*(q|k|o|up|gate)_proj"]}),
        ),
    }


# Which compressed-tensors runs, which rounds activations, and whose codes go into a graph.
SCHEMES = {
    "W4A16": (False, False, 4),
    "W4A16_ASYM": (False, False, 4),
    "W4A16 by channel": (False, False, 4),
    "actorder weight": (False, False, 4),
    "actorder static": (False, False, 4),
    "W8A16": (False, False, 8),
    "W8A16 asymmetric": (False, False, 8),
    "W4AFP8": (False, True, 4),
    "W8A8": (True, True, 8),
    "W8A8 asymmetric": (True, True, 8),
    "FP8": (True, True, None),
    "FP8_DYNAMIC": (True, True, None),
    "FP8_BLOCK": (True, True, None),
    "FP8_BLOCK, uneven": (True, True, None),
    "NVFP4": (False, True, None),
    "NVFP4A16": (False, False, None),
    "mixed": (False, True, None),
}


def observe(module):
    """Give a module the scales and zero points of its weight's ranges."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.data.float()
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    count = -(-rows // height)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, count * height - rows))
    blocks = weight.reshape(count, height, columns // width, width)
    low, high, divisor = blocks.amin((1, 3)), blocks.amax((1, 3)), None
    if args.strategy == "tensor_group":
        divisor = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
        module.weight_global_scale.data.copy_(divisor)
    scales, zeros = calculate_qparams(low, high, args, divisor)
    module.weight_scale.data.copy_(scales.reshape(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zeros.reshape(module.weight_zero_point.shape))
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.05)


@pytest.fixture(scope="module")
def compressed(plain, tmp_path_factory):
    """A function (a key of SCHEMES) -> (a checkpoint by compressed-tensors, its own unpacking)."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from transformers import Qwen3Model

    made = {}

    def make(name):
        if name not in made:
            model = Qwen3Model.from_pretrained(plain, dtype="bfloat16")
            groups = {f"group_{i}": each for i, each in enumerate(schemes()[name])}
            config = QuantizationConfig(config_groups=groups, ignore=["re:.*v_proj"])
            apply_quantization_config(model, config)
            modules = {
                path: module
                for path, module in model.named_modules()
                if hasattr(module, "quantization_scheme")
            }
            for module in modules.values():
                observe(module)
            compressor = ModelCompressor.from_pretrained_model(model)
            compressor.compress_model(model)
            for module in modules.values():
                module.quantization_status = QuantizationStatus.COMPRESSED
            folder = shutil.copytree(plain, tmp_path_factory.mktemp("compressed") / "checkpoint")
            model.save_pretrained(folder)
            compressor.update_config(folder)
            compressor.decompress_model(model)
            values = {path: module.weight.detach() for path, module in modules.items()}
            made[name] = folder, values
        return made[name]

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(compressed, name):
    """Each matrix is what compressed-tensors unpacks, bit for bit in its 16 bits."""
    import torch

    folder, expected = compressed(name)
    assert len(expected) == 6
    by_library, rounds, bits = SCHEMES[name]
    spec = ModelSpec.from_checkpoint(folder)
    assert isinstance(spec.quantization, LibraryQuantization) == by_library
    weights = StoredWeights(spec)
    assert weights.quantization.rounds_activations == rounds
    assert weights.formats.keys() == expected.keys()
    assert IGNORED not in weights.formats
    assert weights.gives_codes(4) == (bits == 4)
    assert weights.quantization.graph_bits == bits
    for matrix, values in expected.items():
        assert values.dtype == torch.bfloat16
        found = torch.from_numpy(weights.read_fp32(f"{matrix}.weight")).bfloat16()
        assert torch.equal(found, values), matrix


@pytest.mark.parametrize("name", ["W4A16_ASYM", "W8A16", "FP8_BLOCK", "NVFP4", "mixed"])
def test_compressed_tensors_runs(compressed, plain, tmp_path, caplog, name):
    """The export and the torch runtime give what the library's numbers give."""
    folder, values = compressed(name)
    by_library, rounds, _ = SCHEMES[name]
    reference = shutil.copytree(plain, tmp_path / "reference")
    tensors = load_torch(plain / "model.safetensors")
    tensors |= {f"{matrix}.weight": value for matrix, value in values.items()}
    save_torch(tensors, reference / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        exported = vectors(embedport.export(folder, tmp_path / "fp32").folder)
    assert ("weights unpacked" in caplog.text) == rounds
    expected = vectors(embedport.export(reference, tmp_path / "plain").folder)
    assert_alike(exported, expected, 0.9999)  # its numbers are rounded to 16 bits
    caplog.clear()
    loaded = vectors(folder)
    assert ("weights unpacked" in caplog.text) == (rounds and not by_library)
    assert_alike(loaded, vectors(reference), 0.99 if by_library else 0.9999)


def test_asymmetric_codes_go_into_a_graph(compressed, tmp_path):
    """W4A16_ASYM in int4 and in fp32: the same numbers."""
    folder, _ = compressed("W4A16_ASYM")
    artifact = embedport.export(folder, tmp_path / "int4", precision="int4", embedding_bits=8)
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["algorithm"] == "stored"
    expected = vectors(embedport.export(folder, tmp_path / "fp32").folder)
    assert_alike(vectors(artifact.folder), expected, 0.999)


def test_fp8_is_quantized_again(compressed, tmp_path, caplog):
    folder, _ = compressed("FP8_BLOCK")
    with caplog.at_level(logging.WARNING):
        embedport.export(folder, tmp_path / "int8", precision="int8")
    assert "(float8, one scale per 16 outputs x 32 inputs) are unpacked and" in caplog.text


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


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"quant_method": "fp8"}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def tensors_of(**weights):
    group = {"targets": ["Linear"], "weights": WEIGHTS | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, "bits should be 4 or 8, found 3; give the original"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype should be 'int32', found 'int64'"),
        (GPTQ | {"format": "gptq_p"}, "format should be 'gptq' or 'gptq_v2', found 'gptq_p'; give"),
        (
            GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"},
            "checkpoint_format and format should be 'gptq' or 'gptq_v2', found 'gptq' and",
        ),
        (GPTQ | {"rotation": "hadamard"}, "rotation should be absent, found 'hadamard'"),
        (GPTQ | {"adapter": {"rank": 8}}, "adapter should be absent, found {'rank': 8}"),
        (GPTQ | {"dynamic": {"q_proj": {"bits": 2}}}, "dynamic: bits should be 4 or 8, found 2"),
        (GPTQ | {"dynamic": ["q_proj"]}, "dynamic should be an object"),
        (AUTO_ROUND | {"bits": 2}, "bits should be 4 or 8, found 2"),
        (AUTO_ROUND | {"packing_format": "auto_round:mlx"}, "packing_format should be one of"),
        (AUTO_ROUND | {"packing_format": "auto_round:exllamav2"}, "found 'auto_round:exllamav2'"),
        (AUTO_ROUND | {"packing_format": 7}, "packing_format should be one of"),
        (AUTO_ROUND | {"act_bits": 8}, "act_bits should be 16 or 32, found 8"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type should be 'int', found 'mx_fp'"),
        (AUTO_ROUND | {"extra_config": {"x": {"bits": 3}}}, "bits should be 4 or 8, found 3"),
        (AUTO_ROUND | {"extra_config": {"x": {"data_type": "fp"}}}, "extra_config of x: data_type"),
        (
            AUTO_ROUND | {"extra_config": {"x": {"rotation_config": {"type": "hadamard"}}}},
            "extra_config of x: rotation_config should be absent",
        ),
        (
            tensors_of(type="float", num_bits=8, symmetric=False) | {"format": "float-quantized"},
            "weights of type float should be symmetric, found symmetric False; give",
        ),
        (tensors_of() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (BNB | {"load_in_4bit": True}, "should be load_in_8bit, or load_in_4bit"),
        (BNB | {"llm_int8_threshold": "6"}, "llm_int8_threshold should be a number, found '6'"),
        (BNB | {"llm_int8_skip_modules": "score"}, "llm_int8_skip_modules should be a list"),
        (BNB | {"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype should be 'float16' or"),
        (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage should be 'uint8'"),
        (tensors_of(where="x"), "config_groups: group_0: weights: where is not known, found 'x'"),
        (tensors_of(num_bits=3), r"should be int of 4 bits or int of 8 bits, found 'int' of 3"),
        (tensors_of(strategy="token"), "weights should have strategy tensor, channel"),
        (tensors_of(group_size=None), "weights should have strategy tensor, channel"),
        (tensors_of(dynamic=True), "weights should not be dynamic"),
        (tensors_of(actorder="other"), "actorder should be weight or group, found 'other'"),
        (tensors_of() | {"format": "mxfp4-pack-quantized"}, "found 'mxfp4-pack-quantized'; give"),
        (tensors_of() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size should be two numbers"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt should be 'float', found 'ue8m0'"),
        (FP8 | {"modules_to_convert": ["embed_tokens"]}, "modules_to_convert should be absent"),
        (
            tensors_of() | {"config_groups": {"a": {"weights": WEIGHTS, "rotation": {"x": 1}}}},
            "config_groups: a: rotation is not known",
        ),
        (GPTQ | {"quant_method": "awq", "bits": 8}, "bits should be 4, found 8"),
        ([1], r"should be an object, found \[1\]"),
        ({"quant_method": "quark"}, ".* is not read, only by 'gptq', .*; give the original"),
    ],
)
def test_refused(plain, tmp_path, config, message):
    folder = shutil.copytree(plain, tmp_path / "plain")
    set_config(folder, config)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*quantization_config.*{message}"):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "precision", "words", "graph_group"),
    [
        (tensors_of(strategy=None), "w4a16", "int4, one scale per 32 inputs of an output", 32),
        (tensors_of(strategy=None, group_size=-1), "w4a16", "int4, one scale per output", 128),
        (tensors_of(strategy=None, group_size=None), "w4a16", "int4, one scale", None),
        (tensors_of(group_size=192), "w4a16", "int4, one scale per 192 inputs of an output", 64),
        (tensors_of(group_size=16), "w4a16", "int4, one scale per 16 inputs of an output", None),
        (
            tensors_of(strategy="block", block_structure="16x32"),
            "w4a16",
            "int4, one scale per 16 outputs x 32 inputs",
            None,
        ),
        (GPTQ, "gptq", "int4, one scale per 32 inputs of an output", 32),
        (GPTQ | {"bits": 8, "group_size": 256}, "gptq-8", "int8, one scale per 256 inputs of", 128),
        (AUTO_ROUND | {"bits": 8}, "w8a16", "int8, one scale per 32 inputs of an output", 32),
        (FP8, "fp8", "float8, one scale per 128 outputs x 128 inputs", None),
    ],
)
def test_which_codes_share_a_scale(config, precision, words, graph_group):
    found = read_quantization(config, Path("config.json"))
    assert isinstance(found, StoredQuantization)
    (format_,) = found.formats
    assert (found.precision, format_.graph_group) == (precision, graph_group)
    assert str(format_).startswith(words)
    assert not format_.has_zero_points


@pytest.mark.parametrize("sizes", ["16x32x1", "16x-32", [16, 0], [16, 32.0], [16]])
def test_blocks_refused(sizes):
    config = tensors_of(strategy="block", block_structure=sizes)
    with pytest.raises(CheckpointError, match="weights should have strategy tensor"):
        read_quantization(config, Path("config.json"))


def test_groups_of_activations_are_not_left_to_the_library(compressed):
    """It would be told of one of them."""
    values = json.loads((compressed("W8A8")[0] / "config.json").read_text())["quantization_config"]
    (group,) = values["config_groups"].values()
    assert isinstance(read_quantization(values, Path("config.json")), LibraryQuantization)
    values["config_groups"] = {
        "a": group | {"targets": ["re:.*q_proj"]},
        "b": group | {"targets": ["re:.*k_proj"]},
    }
    found = read_quantization(values, Path("config.json"))
    assert isinstance(found, StoredQuantization)
    assert found.rounds_activations


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


def test_dense_sparsity(plain, tmp_path):
    """Older versions of llm-compressor note that nothing is sparse."""
    folder = shutil.copytree(plain, tmp_path / "plain")
    dense = {"format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 0.1}
    set_config(folder, tensors_of() | {"sparsity_config": dense})
    ModelSpec.from_checkpoint(folder)


def test_scales_beyond_fp16(with_matrix):
    """Said of the tensor, not of a result."""
    config, parts, _ = recorded("gptqmodel", "ordered")
    parts["scales"][0, 0] = np.inf
    weights = StoredWeights(ModelSpec.from_checkpoint(with_matrix(parts, config)))
    with pytest.raises(CheckpointError, match=r"down_proj\.scales should be finite, found NaN or"):
        weights.read(f"{MATRIX}.weight")


def test_damaged_floats(compressed, tmp_path):
    """A global scale of zero, codes without their scale, and a table in 8 bits."""
    import torch

    folder = shutil.copytree(compressed("NVFP4")[0], tmp_path / "nvfp4")
    tensors = load_torch(folder / "model.safetensors")
    divisor = f"{MATRIX}.weight_global_scale"
    save_torch(tensors | {divisor: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight_global_scale should be above 0, found 0"):
        StoredWeights(ModelSpec.from_checkpoint(folder)).read(f"{MATRIX}.weight")
    folder = shutil.copytree(compressed("FP8_BLOCK")[0], tmp_path / "fp8")
    tensors = load_torch(folder / "model.safetensors")
    table = tensors["embed_tokens.weight"].to(torch.float8_e4m3fn)
    for changed, message in (
        ({f"{MATRIX}.weight_scale": None}, r"down_proj\.weight_scale is missing beside"),
        ({"embed_tokens.weight": table}, "embed_tokens is quantized, and only projections"),
        ({f"{MATRIX}.weight": tensors[f"{MATRIX}.weight"].float()}, "should be F8_E4M3 of shape"),
    ):
        kept = {name: value for name, value in (tensors | changed).items() if value is not None}
        save_torch(kept, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            StoredWeights(ModelSpec.from_checkpoint(folder))


def test_inspect(compressed, monkeypatch, capsys):
    """It says how a checkpoint is quantized, and what is done with it."""
    monkeypatch.setattr("sys.argv", ["embedport", "inspect", str(compressed("NVFP4")[0])])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().out.split())
    assert "quantized by compressed-tensors: nvfp4 float4, one scale per 16 inputs of an" in said
    assert "weights unpacked: its library rounds activations too, which is not done here" in said


def test_what_it_is_called(compressed):
    quantization = ModelSpec.from_checkpoint(compressed("W4A16")[0]).quantization
    assert isinstance(quantization, StoredQuantization)
    assert quantization.precision == "w4a16"
    assert quantization.graph_bits == 4
    assert replace(quantization, reorders=True).graph_bits is None
