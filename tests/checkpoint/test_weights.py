"""Weights: every way a checkpoint stores them, and every way it can be damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file
from safetensors.torch import save_file as save_torch

from embedport import ModelSpec
from embedport.checkpoint.tensor_files import INDEX, SINGLE
from embedport.checkpoint.weights import Weights
from embedport.errors import CheckpointError
from embedport.quantize import stored


def open_weights(folder):
    return Weights(ModelSpec.from_checkpoint(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("shard_bytes", [2 << 30, 100_000])
def test_reads_what_was_written(checkpoints, dtype, task, shard_bytes):
    folder = checkpoints("kv2", task, dtype=dtype, shard_bytes=shard_bytes)
    weights = open_weights(folder)
    assert (folder / INDEX).exists() == (shard_bytes == 100_000)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    prefix = "model." if task == "reranker" else ""
    name = "layers.1.mlp.down_proj.weight"
    expected = stored[prefix + name]
    found = weights.read(name)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(weights.read(name, slice(3, 7)), expected[3:7])
    assert weights.read_fp32(name).dtype == np.float32
    head = "embed_tokens.weight" if weights.spec.tied else "lm_head.weight"
    if task == "reranker":
        rows = stored[head if head.startswith("lm_head") else prefix + head].astype(np.float32)
        np.testing.assert_array_equal(weights.answer_row(9, 4), rows[9] - rows[4])


def test_bare_names_of_a_reranker_and_prefixed_names_of_an_embedding(checkpoints, copied):
    folder = copied(checkpoints())
    tensors = load_file(folder / SINGLE)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / SINGLE)
    assert open_weights(folder).tensors["norm.weight"].name == "model.norm.weight"


def test_a_tensor_under_both_names(checkpoints, copied):
    """transformers takes the bare one of some of them, and the prefixed one of all of them."""
    folder = copied(checkpoints())
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "model.norm.weight": 2 * tensors["norm.weight"]}, folder / SINGLE)
    with pytest.raises(
        CheckpointError,
        match=r"has tensor norm\.weight, and model\.safetensors model\.norm\.weight",
    ):
        open_weights(folder)


class TestDamage:
    """Each error names the file and the tensor, what was expected and what was found."""

    @pytest.fixture
    def folder(self, checkpoints, copied):
        return copied(checkpoints(shard_bytes=100_000))

    @pytest.fixture
    def single(self, checkpoints, copied):
        return copied(checkpoints())

    def test_truncated_shard(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{shard} is not a whole safetensors file"):
            open_weights(folder)

    def test_clone_without_lfs(self, single):
        (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(CheckpointError, match="is a pointer of Git LFS: `git lfs pull`"):
            open_weights(single)

    def test_an_artifact_is_no_checkpoint(self, single):
        (single / SINGLE).unlink()
        (single / "onnx").mkdir()
        with pytest.raises(CheckpointError, match=r"has neither .*, and no embedport\.json"):
            open_weights(single)
        (single / "embedport.json").write_text("{}")
        with pytest.raises(CheckpointError, match="it is an artifact; give the checkpoint"):
            open_weights(single)

    def test_unfinished_download(self, single):
        (single / SINGLE).unlink()
        snapshot = single.parent / "snapshots" / "0123"
        shutil.copytree(single, snapshot)
        with pytest.raises(CheckpointError, match="its download into the hub's cache is unfinish"):
            open_weights(snapshot)

    def test_missing_shard(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard} is missing; {INDEX} names it"):
            open_weights(folder)

    def test_index_names_a_missing_tensor(self, folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["layers.9.extra"] = sorted(folder.glob("*.safetensors"))[0].name
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"lacks tensor layers\.9\.extra"):
            open_weights(folder)

    @pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 7])
    def test_index_points_outside(self, folder, file):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["norm.weight"] = file
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="should be in a file beside the index"):
            open_weights(folder)

    def change(self, folder, **changes):
        tensors = load_file(folder / SINGLE)
        for name, tensor in changes.items():
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, folder / SINGLE)

    def test_missing_tensor(self, single):
        self.change(single, **{"layers.0.self_attn.q_norm.weight": None})
        with pytest.raises(
            CheckpointError,
            match=r"layers\.0\.self_attn\.q_norm\.weight .* of shape \[48\] is missing",
        ):
            open_weights(single)

    def test_wrong_shape(self, single):
        self.change(single, **{"norm.weight": np.ones(63, np.float32)})
        with pytest.raises(
            CheckpointError, match=r"norm\.weight should have shape \[64\].*found \[63\]"
        ):
            open_weights(single)

    @pytest.mark.parametrize("width", [64, 32])  # two 4-bit codes in a byte
    def test_wrong_dtype(self, single, width):
        self.change(single, **{"norm.weight": np.ones(width, np.int8)})
        with pytest.raises(
            CheckpointError, match=r"norm\.weight should be BF16.*found I8.*; give the "
        ):
            open_weights(single)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "qmodel.pt"])
    def test_pickled_only(self, single, name):
        (single / SINGLE).rename(single / name)
        with pytest.raises(CheckpointError, match=f"{name} is pickled and is not read"):
            open_weights(single)


def test_tensors_that_nothing_reads_are_named_once(checkpoints, copied, caplog):
    folder = copied(checkpoints())
    tensors = load_file(folder / SINGLE)
    layer = tensors["layers.0.mlp.down_proj.weight"]
    extra = {f"layers.{i}.mlp.down_proj.weight": layer.copy() for i in range(2, 6)}
    save_file({**tensors, "lm_head.weight": layer.copy(), **extra}, folder / SINGLE)
    for _ in range(2):
        open_weights(folder)
    names = ", ".join(f"layers.{i}.mlp.down_proj.weight" for i in (2, 3, 4))
    assert caplog.messages == [
        f"{folder}: no layer of config.json reads {names} and 1 more: without effect"
    ]


@pytest.mark.parametrize("change", ["removed", "of another shape", "of another dtype"])
@pytest.mark.parametrize("stored_as", ["floats", "gptq", "fp8"])
def test_a_file_that_is_replaced_before_it_is_read(
    checkpoints, rounded, quantized, copied, stored_as, change
):
    """Headers are read when a model is opened; tensors of a large one follow minutes later."""
    makers = {
        "floats": lambda: checkpoints("kv8"),
        "gptq": lambda: rounded("gptq"),
        "fp8": lambda: quantized("fp8"),
    }
    path = copied(makers[stored_as]()) / SINGLE
    weights = stored.open_weights(ModelSpec.from_checkpoint(path.parent))
    tensors = torch_file(path)
    matrix = "layers.0.mlp.up_proj."
    for name in [name for name in tensors if name.startswith(matrix)]:
        if change == "removed":
            del tensors[name]
        elif change == "of another shape":
            tensors[name] = tensors[name][:-1].clone()
        else:
            tensors[name] = tensors[name].to(torch.float64)
    save_torch(tensors, path)
    with pytest.raises(CheckpointError, match="was replaced meanwhile"):
        weights.read_fp32(f"{matrix}weight")
