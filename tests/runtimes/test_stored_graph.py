"""4-bit checkpoints on a CPU: a graph of their own codes, built once into the cache folder."""

import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.integrity import cache_folder
from embedport.quantize.stored import StoredWeights
from embedport.runtimes import bulk, loading, read_info
from embedport.runtimes.onnxruntime import OnnxModel
from embedport.runtimes.torch import TorchModel
from embedport.texts.samples import builtin_pairs, builtin_samples
from tests.synthetic import edit

TEXTS = ["", *[sample.text for sample in builtin_samples() if len(sample.text) < 100][:6]]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs() if len(pair.document) < 100][:4]
WRITTEN = "a graph of its 4-bit weights is written to"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own: where graphs are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("graphs")


def results(model):
    if isinstance(model, embedport.Embedder):
        return model.encode(TEXTS)
    return model.score(PAIRS)


def written(caplog):
    return [record for record in caplog.records if WRITTEN in record.message]


@pytest.mark.parametrize(
    ("method", "task"), [("gptq", "embedding"), ("awq", "embedding"), ("awq", "reranker")]
)
def test_runs_packed(rounded, cache, monkeypatch, caplog, method, task):
    """torch's vectors of the unpacked weights, without torch's copy of them."""
    folder = rounded(method, task)
    before = sorted(folder.rglob("*"))
    model = embedport.load(folder, device="cpu")
    assert isinstance(model.model, OnnxModel)
    precision = read_info(folder).precision
    assert (model.device, model.precision) == ("cpu", f"{precision} (computed in fp32)")
    assert "is written to" in caplog.text
    # It is still the checkpoint, and nothing was written beside it.
    assert (model.info.folder, model.info.precision) == (folder, precision)
    assert sorted(folder.rglob("*")) == before
    assert bulk.hash_model(model.info) == bulk.hash_model(read_info(folder))
    found = results(model)
    np.testing.assert_array_equal(results(pickle.loads(pickle.dumps(model))), found)
    assert len(written(caplog)) == 1
    monkeypatch.setattr(loading, "find_stored_graph", lambda spec: None)
    unpacked = embedport.load(folder, device="cpu")
    assert isinstance(unpacked.model, TorchModel)
    expected = results(unpacked)
    if task == "embedding":
        assert (found * expected).sum(axis=1).min() >= 0.9999
    else:
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("case", ["groups", "rows"])
def test_holds_the_checkpoints_own_numbers(rounded, copied, cache, case):
    """Codes, scales, zero points and the table, bit for bit; a scale a row stands in each group."""
    folder = copied(rounded("gptq" if case == "rows" else "awq"))
    if case == "rows":
        give_one_group(folder)
    embedport.load(folder, device="cpu")
    (path,) = cache.rglob("model.onnx")
    held = {
        name: ir.tensor(value.const_value).numpy()
        for name, value in ir.load(path).graph.initializers.items()
        if value.const_value is not None
    }
    weights = StoredWeights(ModelSpec.from_checkpoint(folder))
    assert len(weights.schemes) == 14
    for name, scheme in weights.schemes.items():
        codes, scales = held[f"{name}.codes"], held[f"{name}.scales"]
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        zeros = np.full(scales.shape, 8)
        if not scheme.symmetric:
            packed = held[f"{name}.zero_points"]
            zeros = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
            zeros = zeros[:, : scales.shape[1]]
        values = (nibbles - zeros[:, :, None].astype(np.float32)) * scales[:, :, None]
        expected = weights.read_fp32(f"{name}.weight")
        found = values.reshape(len(expected), -1)[:, : expected.shape[1]]
        np.testing.assert_array_equal(found, expected)
    table = held["embed_tokens.weight"]
    assert table.dtype == weights.read("embed_tokens.weight").dtype
    np.testing.assert_array_equal(table, weights.read("embed_tokens.weight"))


def give_one_group(folder):
    """Turn a GPTQ checkpoint's groups into one a row (group_size -1), of the first one's scale."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, values in tensors.items():
        if name.endswith((".scales", ".qzeros")):
            tensors[name] = np.ascontiguousarray(values[:1])
        elif name.endswith(".g_idx"):
            tensors[name] = np.zeros_like(values)
    save_file(tensors, path, metadata={"format": "pt"})
    change(folder, group_size=-1)


def change(folder, **quantization):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= quantization
    path.write_text(json.dumps(config))


def test_is_built_once(rounded, copied, cache, caplog):
    """By one of several that ask; again for another checkpoint, or if it is damaged."""
    folder = copied(rounded("gptq"))
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda _: embedport.load(folder, device="cpu"), range(3)))
    assert len(written(caplog)) == 1
    assert len([*cache.iterdir()]) == 1
    expected = results(models[0])
    # Figures recorded in the manifest change no vector.
    (folder / "README.md").write_text("another card")
    embedport.load(folder, device="cpu")
    assert len(written(caplog)) == 1
    data = next(cache.rglob("model.onnx_data"))
    data.write_bytes(data.read_bytes()[:-1])
    np.testing.assert_array_equal(results(embedport.load(folder, device="cpu")), expected)
    assert len(written(caplog)) == 2
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][::-1].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not np.allclose(results(embedport.load(folder, device="cpu")), expected, atol=1e-3)
    assert len([*cache.iterdir()]) == 2


def test_needs_no_torch(rounded, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    model = embedport.load(rounded("awq"))
    assert model.device == "cpu"
    assert np.isfinite(results(model)).all()


def test_says_why_it_is_unpacked(rounded, copied, cache, monkeypatch, caplog):
    """Act-order, masked attention, an unwritable cache, no onnxruntime: a warning says so."""

    def load(folder):
        caplog.clear()
        model = embedport.load(folder, device="cpu")
        assert isinstance(model.model, TorchModel)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "its weights are unpacked to 16 bits, and torch runs it: " in record.message
        return record.message

    folder = copied(rounded("gptq"))
    cache.parent.mkdir(parents=True)
    cache.write_text("not a folder")
    assert "its graph cannot be written" in load(folder)
    cache.unlink()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime, which multiplies by 4-bit weights, is not installed" in load(folder)
    monkeypatch.undo()
    edit(folder / "config.json", is_causal=False)
    assert "attention has a mask, and in a graph it would take" in load(folder)
    edit(folder / "config.json", is_causal=None)
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, desc_act=True)
    assert "a graph cannot hold layers.0.mlp.up_proj and 0 others" in load(folder)
