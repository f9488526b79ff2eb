"""Checkpoints of every preset of compressed-tensors, against what it unpacks itself."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
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
from tests.foreign import IGNORED, MATRIX, assert_alike, vectors


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
