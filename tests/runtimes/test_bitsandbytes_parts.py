"""Checkpoints of bitsandbytes whose tensors or lists of names do not fit: refused, not computed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.errors import CheckpointError

WEIGHT = "layers.0.mlp.up_proj.weight"
MATRIX = WEIGHT.removesuffix(".weight")
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def altered(quantized, copied):
    """A function (method, change of the tensors, values of quantization_config) -> a checkpoint."""

    def make(method, change=None, double=False, **values):
        folder = copied(quantized(method, **({"double_quant": True} if double else {})))
        (folder / "embedport.json").unlink()
        tensors = load_file(folder / "model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= values
        path.write_text(json.dumps(config))
        return folder

    return make


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:5].copy()})


def state(**changes):
    """Change the JSON that describes a matrix."""

    def change(tensors):
        values = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


def in_16_bits(tensors):
    for part in [name for name in tensors if name.startswith(f"{MATRIX}.")]:
        del tensors[part]
    tensors[WEIGHT] = np.zeros((256, 128), np.float16)


def in_another_order(tensors):
    tensors[f"{MATRIX}.weight_format"] = np.array(2, np.uint8)


def a_table_in_8_bits(tensors):
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].astype(np.int8)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "bnb-int8",
            without(f"{MATRIX}.SCB"),
            r"SCB should be F32 of \[256\], found none",
        ),
        ("bnb-int8", cut(f"{MATRIX}.SCB"), r"SCB should be F32 of \[256\], found F32 of \[5\]"),
        ("bnb-int8", in_another_order, r"weight_format should be 0 \(rows\), found 2"),
        ("bnb-int8", a_table_in_8_bits, r"embed_tokens\.weight should be .*, found I8"),
        ("bnb-nf4", without(STATE), "quant_type in .* should be 'nf4', found None"),
        ("bnb-nf4", cut(STATE), "quant_type in .* should be 'nf4', found None"),
        (
            "bnb-nf4",
            cut(f"{WEIGHT}.absmax"),
            r"absmax should be F32 of \[512\], found F32",
        ),
        ("bnb-nf4", cut(f"{WEIGHT}.quant_map"), r"quant_map should be F32 of \[16\]"),
        (
            "bnb-nf4",
            state(shape=[128, 256]),
            r"shape in .* should be \[256, 128\], found \[",
        ),
        ("bnb-nf4", state(quant_type="fp4"), "quant_type in .* should be 'nf4', found 'fp4'"),
        ("bnb-nf4", state(blocksize=32), r"absmax should be F32 of \[1024\]"),
        ("bnb-nf4", state(blocksize=0), "blocksize in .* should be a number, found 0"),
        (
            "bnb-nf4",
            state(nested_blocksize=256),
            "nested_offset in .* should be a number",
        ),
    ],
)
def test_parts(altered, method, change, message):
    """bitsandbytes takes no lengths: its kernels would read what lies behind a tensor."""
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        embedport.load(altered(method, change), device="cpu")


def test_parts_of_double_quantization(altered):
    folder = altered("bnb-nf4", without(f"{WEIGHT}.nested_absmax"), double=True)
    with pytest.raises(CheckpointError, match=r"nested_absmax should be F32 of \[2\], found none"):
        embedport.load(folder, device="cpu")


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4"])
def test_a_matrix_that_the_list_lacks(altered, method):
    """The library would quantize it when it loads, or fail at an assertion."""
    message = r"up_proj\.weight is F16, but by .*llm_int8_skip_modules.* it is quantized"
    with pytest.raises(CheckpointError, match=message):
        embedport.load(altered(method, in_16_bits), device="cpu")


def test_a_matrix_that_the_list_has(altered):
    """Codes would be taken for values."""
    folder = altered("bnb-int8", llm_int8_skip_modules=["q_proj"])
    message = r"q_proj\.weight is I8, but by .* it is not quantized"
    with pytest.raises(CheckpointError, match=message):
        embedport.load(folder, device="cpu")


def test_a_threshold_in_whole_numbers(altered):
    """transformers takes a float only."""
    embedport.load(altered("bnb-int8", llm_int8_threshold=6), device="cpu")
