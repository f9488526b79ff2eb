"""config.json's quantization_config of other libraries: what is read, what is refused."""

from pathlib import Path

import pytest

from embedport.checkpoint.quantization_config import (
    LibraryQuantization,
    StoredQuantization,
    read_quantization,
)
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError
from tests.foreign import GPTQ, WEIGHTS, set_config, tensors_of

AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8"}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}


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
def test_refused(damageable, config, message):
    set_config(damageable, config)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*quantization_config.*{message}"):
        ModelSpec.from_checkpoint(damageable)


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


def test_what_is_not_said_is_int8():
    """compressed-tensors' defaults of num_bits and type, of weights and of activations."""
    weights, tokens = {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens}
    config = tensors_of() | {"format": "int-quantized", "config_groups": {"group_0": group}}
    found = read_quantization(config, Path("config.json"))
    assert isinstance(found, LibraryQuantization)
    assert found.precision == "w8a8"


@pytest.mark.parametrize("sizes", ["16x32x1", "16x-32", [16, 0], [16, 32.0], [16]])
def test_blocks_refused(sizes):
    config = tensors_of(strategy="block", block_structure=sizes)
    with pytest.raises(CheckpointError, match="weights should have strategy tensor"):
        read_quantization(config, Path("config.json"))


def test_dense_sparsity(damageable):
    """Older versions of llm-compressor note that nothing is sparse."""
    dense = {"format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 0.1}
    set_config(damageable, tensors_of() | {"sparsity_config": dense})
    ModelSpec.from_checkpoint(damageable)
