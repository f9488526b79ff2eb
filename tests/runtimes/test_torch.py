"""Checkpoints in torch: plain ones and every quantized format, against transformers itself."""

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.hub import Source
from embedport.checkpoint.spec import ModelSpec, read_spec
from embedport.errors import CheckpointError, DeviceError, InputError, MissingPackageError
from embedport.exporters.classifier import pair_template
from embedport.quantize.stored import StoredWeights, open_weights
from embedport.runtimes import loading
from embedport.runtimes import torch as adapter
from embedport.runtimes.checkpoint import _silent as silent
from embedport.runtimes.checkpoint import rounds_tokens
from embedport.texts.prompts import load_tokenizer
from embedport.texts.samples import Pair, builtin_pairs, builtin_samples
from embedport.validation.card import CardReference
from embedport.validation.opening import open_live

torch = pytest.importorskip("torch")

# Short ones, and a long one of each kind: fewer tokens, in as many lengths.
TEXTS = [sample.text for sample in builtin_samples() if len(sample.text) < 200] + [""]
TEXTS += [max((s.text for s in builtin_samples() if len(s.text) < 500), key=len)]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs() if len(pair.document) < 200]
PAIRS += [(pair.query, pair.document) for pair in builtin_pairs() if len(pair.document) == 328]
# Formats that a library runs, and formats whose codes are unpacked.
RUN, UNPACKED = ("bnb-int8", "bnb-nf4", "w8a8", "fp8"), ("gptq", "awq")


def results(model, batch_tokens=4096):
    if isinstance(model, embedport.Embedder):
        return model.encode(TEXTS, batch_tokens=batch_tokens)
    return model.score(PAIRS, batch_tokens=batch_tokens)


def rows_of(model):
    inputs = TEXTS if isinstance(model, embedport.Embedder) else PAIRS
    return model.tokenizer.encode(inputs).ids


def agreement(found, expected):
    """The worst cosine of vectors, or 1 less the largest difference of scores."""
    if found.ndim == 1:
        return 1 - np.abs(found - expected).max()
    return (found * expected).sum(axis=1).min()


@pytest.mark.parametrize(
    ("dtype", "precision", "limit"),
    [
        ("float32", "fp32", 0.9999),  # of weights that the reference rounds to fp16
        ("float16", "fp16 (computed in fp32)", 0.999999),
        ("bfloat16", "bf16", 0.99),
    ],
)
@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("geometry", ["kv2", pytest.param("kv1", marks=pytest.mark.slow)])
def test_plain(checkpoints, geometry, task, dtype, precision, limit):
    folder = checkpoints(geometry, task, dtype=dtype)
    model = embedport.load(folder, device="cpu")
    assert (model.device, model.precision) == ("cpu", precision)
    assert model.artifact is None
    assert repr(precision) in repr(model)
    reference = CardReference(ModelSpec.from_checkpoint(folder, task=task), 512, "cpu")
    expected = reference.run_rows([row.tolist() for row in rows_of(model)], "fp32")
    found = results(model)
    assert found.dtype == np.float32
    assert agreement(found, expected) > limit
    if task == "embedding":
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    # Its path is that of w8a8.
    [pytest.param(each, marks=[pytest.mark.slow] if each == "fp8" else []) for each in RUN],
)
@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_as_transformers_runs_it(quantized, method, task):
    from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

    folder = quantized(method, task)
    model = embedport.load(folder, device="cpu")
    assert model.precision.startswith(method)
    assert model.artifact is not None
    kind = AutoModel if task == "embedding" else AutoModelForCausalLM
    options = {}
    if method in ("w8a8", "fp8"):  # with activations rounded, and all else in fp32
        options["quantization_config"] = CompressedTensorsConfig(dequantize=False)
        options["dtype"] = torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not the folder's own
        theirs = kind.from_pretrained(folder, use_safetensors=True, **options)
    answers = [load_tokenizer(folder / "tokenizer.json").token_to_id(t) for t in ("no", "yes")]
    expected = []
    with torch.no_grad():
        for ids in rows_of(model):
            output = theirs(input_ids=torch.from_numpy(ids)[None])
            if task == "embedding":
                last = output.last_hidden_state[0, -1].float()
                expected.append(torch.nn.functional.normalize(last, dim=0).numpy())
            else:
                logits = output.logits[0, -1, answers].float()
                expected.append(torch.softmax(logits, dim=0)[1].numpy())
    found = results(model, batch_tokens=1)  # a batch's other rows move bf16's last bit
    # Their logits of a reranker are rounded to bf16.
    assert agreement(found, np.stack(expected)) > (0.9999 if task == "embedding" else 0.99)


@pytest.mark.parametrize("method", UNPACKED)
@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_unpacked(quantized, checkpoints, monkeypatch, copied, method, task):
    """In torch, the same as a plain checkpoint that holds what the codes stand for."""
    monkeypatch.setattr(loading, "find_stored_graph", lambda spec: None)
    folder = quantized(method, task)
    weights = open_weights(read_spec(Source("", None, folder), task))
    assert isinstance(weights, StoredWeights)
    assert len(weights.schemes) == 14
    plain = copied(checkpoints("kv8", task))
    prefix = "model." if task == "reranker" else ""
    tensors = {
        name if name == "lm_head.weight" else prefix + name: weights.read_fp32(name)
        for name in weights.spec.tensor_shapes()
    }
    # As codes are computed with.
    halves = {name: torch.from_numpy(values).bfloat16() for name, values in tensors.items()}
    save_torch(halves, plain / "model.safetensors")
    expected = results(embedport.load(plain, device="cpu"))
    assert agreement(results(embedport.load(folder, device="cpu")), expected) > 0.99999


@pytest.mark.parametrize(
    "method", ["gptq", *(pytest.param(method, marks=pytest.mark.slow) for method in ("awq", *RUN))]
)
def test_a_classifier_gives_the_same_scores(quantized, method):
    found = results(embedport.load(quantized(method, "reranker"), device="cpu"))
    # Its row is rounded to 16 bits.
    folder = quantized(method, "reranker", form="sequence-classification")
    np.testing.assert_allclose(results(embedport.load(folder, device="cpu")), found, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("geometry", ["kv1", "kv2"])
def test_a_plain_classifier(checkpoints, copied, tmp_path, geometry, rows):
    folder = checkpoints(geometry, "reranker", dtype="float32")
    expected = results(embedport.load(folder, device="cpu"))
    folder = make_classifier(copied(folder), rows)
    (folder / "chat_template.jinja").write_text(pair_template())
    found = embedport.load(folder, device="cpu")
    np.testing.assert_allclose(results(found), expected, atol=1e-6)
    # The exporter takes the same head.
    embedport.export(folder, tmp_path / "graph")
    graph = embedport.load(tmp_path / "graph", device="cpu")
    np.testing.assert_allclose(results(graph), expected, atol=1e-5)


def make_classifier(folder, rows):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    no, yes = (head[tokenizer.token_to_id(word)] for word in ("no", "yes"))
    tensors["score.weight"] = np.stack([no, yes]) if rows == 2 else (yes - no)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    if rows == 1:
        config["id2label"] = {"0": "yes"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("rows", [1, 2])
def test_a_classifier_is_its_own_reference(checkpoints, copied, rows):
    """In a CrossEncoder, under the folder's template; the same scores as of the whole head."""
    whole = checkpoints("kv1", "reranker", dtype="float32")
    folder = make_classifier(copied(whole), rows)
    (folder / "chat_template.jinja").write_text(pair_template())
    pairs = [Pair("tea", "A leaf."), Pair("tea", "Snow is cold.")]
    reference = open_live(folder, task="reranker", max_length=512, device="cpu")
    expected = open_live(whole, task="reranker", max_length=512, device="cpu")
    assert (reference.origin.library, expected.origin.library) == (
        "sentence-transformers",
        "transformers",
    )
    assert reference.token_ids(pairs) == expected.token_ids(pairs)
    np.testing.assert_allclose(reference.run(pairs, "fp32"), expected.run(pairs, "fp32"), atol=1e-6)


def test_three_labels_are_no_reranker(checkpoints, copied):
    folder = make_classifier(copied(checkpoints("kv1", "reranker", dtype="float32")), 1)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="one label, yes, or two, no and yes; found 3"):
        embedport.load(folder, device="cpu")


def test_sharded(checkpoints):
    whole = results(embedport.load(checkpoints("kv1", dtype="float32"), device="cpu"))
    parts = checkpoints("kv1", dtype="float32", shard_bytes=100_000)
    np.testing.assert_array_equal(results(embedport.load(parts, device="cpu")), whole)


def test_either_padding_and_any_batch(checkpoints):
    model = embedport.load_embedder(checkpoints("kv2", dtype="float32"), device="cpu")
    rows = rows_of(model)[:3]
    width = max(map(len, rows)) + 3
    for shift in (lambda row: 0, lambda row: width - len(row), lambda row: 1):
        ids, mask = np.full((3, width), 9), np.zeros((3, width), np.int64)
        for i, row in enumerate(rows):
            ids[i, shift(row) : shift(row) + len(row)] = row
            mask[i, shift(row) : shift(row) + len(row)] = 1
        np.testing.assert_allclose(model.model(ids, mask), model.encode(TEXTS[:3]), atol=1e-6)
    one = model.encode(TEXTS, batch_tokens=1)
    np.testing.assert_allclose(model.encode(TEXTS), one, atol=1e-6)


def test_ranges_stay_in_memory(checkpoints, copied):
    folder = copied(checkpoints("kv1"))
    before = sorted(folder.rglob("*"))
    model = embedport.load_embedder(folder, device="cpu")
    model.calibrate(TEXTS)
    assert model.encode(TEXTS[:2], precision="int8").dtype == np.int8
    assert sorted(folder.rglob("*")) == before
    assert embedport.load(folder, device="cpu").info.ranges is None


def test_ranges_of_an_artifact_go_into_its_manifest(quantized, copied):
    folder = copied(quantized("gptq"))
    model = embedport.load_embedder(folder, device="cpu")
    model.calibrate(TEXTS)
    assert json.loads((folder / "embedport.json").read_text())["ranges"] == model.ranges


def test_prompts_lengths_and_devices(checkpoints, monkeypatch):
    folder = checkpoints("kv1")
    model = embedport.load_embedder(folder, device="cpu", max_length=16)
    assert model.tokenizer.max_length == 16
    assert (model.encode(["gravity"]) * model.encode(["gravity"], prompt="query")).sum() < 0.999
    with pytest.raises(InputError, match="max_length should be from 1 to 32768"):
        embedport.load(folder, max_length=0)
    with pytest.raises(InputError, match="a checkpoint runs on auto, cpu, cuda; found device 'ten"):
        embedport.load(folder, device="tensorrt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert embedport.load(folder).device == "cpu"
    with pytest.raises(DeviceError, match="has no CUDA device"):
        embedport.load(folder, device="cuda")


def test_a_full_gpu_is_said(checkpoints, monkeypatch):
    model = embedport.load_embedder(checkpoints("kv1"), device="cpu")

    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model, "_layers", full)
    with pytest.raises(InputError, match=r"a batch of 1 x \d+ tokens does not fit"):
        model.encode(["a"])
    monkeypatch.setattr(adapter, "load_base", full)
    with pytest.raises(DeviceError, match="does not fit into the GPU's free memory"):
        embedport.load(checkpoints("kv1"), device="cpu")


def test_missing_package(quantized, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'embedport\[quantize\]'"):
        embedport.load(quantized("bnb-nf4"), device="cpu")


@pytest.mark.parametrize("method", ["w8a8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_rounded_activations_do_not_depend_on_the_batch(quantized, monkeypatch, method):
    """Matrices stay in 8 bits, and no library is needed."""
    folder = quantized(method, "reranker")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    model = embedport.load(folder, device="cpu")
    np.testing.assert_allclose(results(model), results(model, batch_tokens=1), rtol=0, atol=2e-4)
    opened: Any = model.model
    layers = opened._layers._base
    assert {each.weight.element_size() for each in projections(layers)} == {1}


@pytest.mark.parametrize("biases", [False, True])
def test_rounded_activations_of_any_size_and_with_biases(checkpoints, copied, tmp_path, biases):
    """In fp32 too, whose result does not depend on the batch; 200 is no multiple of 16."""
    folder = copied(checkpoints("kv1"))
    if biases:
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if "self_attn" in name and "_proj" in name]:
            rows = tensors[name].shape[0]
            values = np.random.default_rng(rows).standard_normal(rows)
            tensors[name.replace("weight", "bias")] = values.astype(tensors[name].dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    embedport.quantize_checkpoint(folder, tmp_path / "out", method="w8a8", fast=True)
    model = embedport.load_embedder(tmp_path / "out", device="cpu")
    assert model.precision == "w8a8 (computed in fp32)"
    expected = embedport.load_embedder(folder, device="cpu").encode(TEXTS)
    found = model.encode(TEXTS)
    assert agreement(found, expected) > 0.99
    np.testing.assert_allclose(found, model.encode(TEXTS, batch_tokens=1), rtol=0, atol=2e-4)


def projections(layers):
    return [module for name, module in layers.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("rows", [1, 7])
def test_int8_products_are_exact(rows):
    """Against integer arithmetic, alone and in a batch to the bit; with a token of zeros."""
    from embedport.runtimes.rounded_linear import RoundedLinear

    generator = np.random.default_rng(0)
    weight = generator.integers(-128, 128, (48, 320), np.int8)
    scales, bias = generator.random((2, 48), np.float32)
    x = generator.standard_normal((9, 320), np.float32)
    x[3] = 0
    layer = RoundedLinear(
        torch.from_numpy(weight), torch.from_numpy(scales), torch.from_numpy(bias)
    )
    steps = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(127.5), 1e-38)
    codes = np.clip(np.rint(x / steps), -128, 127).astype(np.int64)
    products = (codes @ weight.T.astype(np.int64)).astype(np.float32)
    found = layer(torch.from_numpy(x[:rows])).numpy()
    np.testing.assert_array_equal(found, (products * steps * scales + bias)[:rows])


def test_a_checkpoint_that_bitsandbytes_cannot_run_here(quantized, monkeypatch):
    """On a CPU with bf16 it takes whole blocks of 64 only, and says so at the first call."""
    import bitsandbytes

    def forward(self, x):
        raise RuntimeError("shape '[64, 2]' is invalid for input of size 160")

    folder = quantized("bnb-nf4")
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)
    with pytest.raises(
        CheckpointError, match=r"cannot run it on cpu: shape '\[64, 2\]' is invalid"
    ):
        embedport.load(folder, device="cpu")


@pytest.mark.parametrize("method", ["w8a8", "bnb-int8", "gptq"])
def test_a_missing_tensor_is_not_made_up(quantized, copied, method):
    folder = copied(quantized(method))
    (folder / "embedport.json").unlink()
    path = next(folder.glob("*.safetensors"))
    tensors = load_torch(path)
    del tensors[
        "layers.1.mlp.gate_proj.weight" if method != "gptq" else "layers.1.mlp.gate_proj.qweight"
    ]
    save_torch(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_proj"):
        embedport.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda norm: norm[1:].clone(), r"tensor norm\.weight should have shape \[128\] .*\[127\]"),
        (lambda norm: norm.to(torch.int8), r"tensor norm\.weight should be .*, found I8"),
    ],
)
def test_another_tensor_is_not_taken(quantized, copied, change, message):
    """Libraries take codes of what is no projection for values."""
    folder = copied(quantized("bnb-int8"))
    (folder / "embedport.json").unlink()
    path = next(folder.glob("*.safetensors"))
    tensors = load_torch(path)
    tensors["norm.weight"] = change(tensors["norm.weight"])
    save_torch(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        embedport.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("input_activations", {}),
        ("input_activations", {"strategy": "tensor"}),
        ("input_activations", {"dynamic": False}),
        ("input_activations", {"symmetric": False}),
        ("weights", {"symmetric": False}),
        ("weights", None),
    ],
)
def test_what_is_rounded_otherwise(quantized, copied, part, changes):
    """Only its library runs it: our layers would leave zero points and static scales out."""
    folder = copied(quantized("w8a8"))
    (folder / "embedport.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    if changes is None:
        path = next(folder.glob("*.safetensors"))
        name = "layers.1.mlp.up_proj.weight_zero_point"
        save_torch(load_torch(path) | {name: torch.zeros(256, 1, dtype=torch.int8)}, path)
    else:
        group[part] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    assert rounds_tokens(ModelSpec.from_checkpoint(folder)) == (changes == {})


def load_torch(path):
    from safetensors.torch import load_file

    return load_file(path)


def save_torch(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.gpu
@pytest.mark.parametrize("method", [None, *RUN, *UNPACKED])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_on_a_gpu(quantized, checkpoints, method, task):
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device here")
    folder = quantized(method, task) if method else checkpoints("kv8", task)
    model = embedport.load(folder)
    assert model.device == "cuda"
    assert agreement(results(model), results(embedport.load(folder, device="cpu"))) > 0.99


def test_standard_error_comes_back():
    """Two threads load at once: the second waits, and does not put the first one's buffer back."""
    before, inside, left = sys.stderr, threading.Event(), threading.Event()

    def load():
        with silent():
            inside.set()
            left.wait(60)

    second = threading.Thread(target=load)
    with silent():
        second.start()
        inside.wait(0.3)
    left.set()
    second.join()
    assert sys.stderr is before


def test_import_stays_light():
    code = "import sys, embedport.runtimes; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert Path(adapter.__file__ or "").name == "torch.py"
