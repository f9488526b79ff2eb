"""A reference that transformers runs: against our own tokenization, and transformers by hand."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing

from embedport.checkpoint.pipeline import Dense
from embedport.errors import CheckpointError, DeviceError, InputError, MissingPackageError
from embedport.texts.prompts import (
    EmbeddingTokenizer,
    RerankerTokenizer,
    query_prompt,
)
from embedport.texts.samples import Pair, Sample, builtin_pairs, builtin_samples
from embedport.validation import live as module
from embedport.validation.card import CardReference
from embedport.validation.live import find_device
from embedport.validation.opening import open_live
from tests.synthetic import append_end_of_text

ODD = ["", " \n", "e\u0301", "<|im_end|> inside", "👩‍👩‍👧‍👦", "a" * 3000]
SAMPLES = [*builtin_samples(), *map(Sample, ODD), Sample("x", query_prompt("Find the statute"))]
PAIRS = [*builtin_pairs(), *(Pair("q", text) for text in ODD)]


@pytest.fixture(scope="module")
def opened(checkpoints):
    """A function (task, max_length) -> CardReference, of an embedder too."""

    def make(task, max_length=512):
        source = open_live(checkpoints("kv2", task), task=task, max_length=max_length).spec
        return CardReference(source, max_length, "cpu")

    return make


@pytest.mark.parametrize("max_length", [512, 33])
def test_embedding_ids(opened, max_length):
    reference = opened("embedding", max_length)
    folder = reference.folder
    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", max_length)
    prompts = reference.spec.prompts
    found = [
        tokenizer.encode([s.text], prompts.get(s.prompt, s.prompt)).ids[0].tolist() for s in SAMPLES
    ]
    assert reference.token_ids(SAMPLES) == found


@pytest.fixture
def bare(checkpoints, copied):
    """A folder that transformers runs: without modules.json."""
    folder = copied(checkpoints("kv2"))
    (folder / "modules.json").unlink()
    return folder


def test_prompts_are_those_that_the_folder_names(bare):
    path = bare / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "find: ", "document": "is: "}}))
    reference = open_live(bare, task="embedding", max_length=64)
    assert reference.origin.library == "transformers"
    own = reference.token_ids([Sample("a", "query"), Sample("a")])
    prompts = {"query": "find: ", "document": "is: "}
    assert reference.declared() == {"prompts": prompts, "default_prompt": None}
    path.unlink()
    assert own == reference.token_ids([Sample("find: a"), Sample("is: a")])
    assert reference.token_ids([Sample("a", "query")]) == reference.token_ids([Sample("a")])
    path.write_text(json.dumps({"prompts": {"query": None, "document": "is: "}}))
    assert reference.token_ids([Sample("is: a", "query")]) == reference.token_ids([Sample("a")])


def test_a_tokenizer_without_a_padding_token(bare):
    """The model does not see padding, whichever token it is."""
    samples = [Sample("tea"), Sample("a longer text")]
    expected = open_live(bare, task="embedding").run(samples, "fp32")
    path = bare / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    reference = open_live(bare, task="embedding")
    assert reference.tokenizer.pad_token is None
    np.testing.assert_allclose(reference.run(samples, "fp32"), expected, atol=1e-6)


@pytest.mark.parametrize("added", [None, "<|im_end|>"])
def test_nothing_is_appended_that_the_tokenizer_does_not_append(bare, added):
    path = bare / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    if added is not None:
        end = tokenizer.token_to_id(added)
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {added}", special_tokens=[(added, end)]
        )
    tokenizer.save(str(path))
    (ids,) = open_live(bare, task="embedding", max_length=64).token_ids([Sample("tea")])
    plain = tokenizer.encode("tea", add_special_tokens=False).ids
    assert ids == (plain if added is None else [*plain, tokenizer.token_to_id(added)])


@pytest.mark.parametrize("max_length", [2048, 400])
def test_reranker_ids(opened, max_length):
    reference = opened("reranker", max_length)
    tokenizer = RerankerTokenizer(reference.folder / "tokenizer.json", max_length)
    found = tokenizer.encode([(pair.query, pair.document) for pair in PAIRS])
    assert reference.token_ids(PAIRS) == [ids.tolist() for ids in found.ids]
    assert found.truncated


def test_reranker_ids_where_the_tokenizer_adds_tokens(checkpoints, copied):
    """The model card's code adds them to the body alone."""
    folder = copied(checkpoints("kv2", "reranker"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = append_end_of_text(tokenizer, folder / "tokenizer.json")
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = open_live(folder, max_length=400).token_ids(PAIRS)
    assert expected[0].count(end) == 1
    found = RerankerTokenizer(folder / "tokenizer.json", 400)
    pairs = [(pair.query, pair.document) for pair in PAIRS]
    assert [ids.tolist() for ids in found.encode(pairs).ids] == expected


def test_vectors_are_the_last_tokens(opened):
    """In a ragged, left-padded batch as from the text alone, after the final norm, unit length."""
    import torch

    reference = opened("embedding")
    rows = reference.token_ids(SAMPLES[::6])
    vectors = reference.run(SAMPLES[::6], "fp32")
    model = reference.load("fp32")
    for row, vector in zip(rows, vectors, strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([row]), output_hidden_states=True)
        expected = states.last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_scores_are_the_softmax_of_yes_and_no(opened):
    import torch

    reference = opened("reranker")
    rows = reference.token_ids(PAIRS[:5])
    scores = reference.run(PAIRS[:5], "fp32")
    model = reference.load("fp32")
    vocabulary = reference.tokenizer.get_vocab()
    for row, score in zip(rows, scores, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([row])).logits[0, -1].double().numpy()
        no, yes = np.exp(logits[[vocabulary["no"], vocabulary["yes"]]])
        assert score == pytest.approx(yes / (yes + no), abs=1e-6)
    assert scores.shape == (5,)


@pytest.mark.parametrize("library", ["transformers", "sentence-transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp32_is_on_weights_rounded_to_fp16_unless_they_are_fp32(
    tmp_path, small_tokenizer, dtype, library
):
    """And nothing but the weights is rounded: not the rotary frequencies."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    from tests.synthetic import TINY, write_checkpoint

    folder = write_checkpoint(tmp_path / "small", TINY, "embedding", small_tokenizer, dtype=dtype)
    path = folder / "model.safetensors"
    # So small that bf16 has digits that fp16 lacks.
    small = {name: weight * 2.0**-14 for name, weight in load_file(path).items()}
    save_file(small, path, metadata={"format": "pt"})
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32)
    reference = open_live(folder, task="embedding", max_length=64)
    if library == "transformers":
        reference = CardReference(reference.spec, 64, "cpu")
    model = reference.load("fp32")
    found = dict(reference.layers_of(model).named_parameters())
    for name, weight in whole.named_parameters():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], weight if dtype == "float32" else weight.half().float())
    assert not torch.equal(whole.embed_tokens.weight.half().float(), whole.embed_tokens.weight)
    inv_freq = reference.layers_of(model).rotary_emb.inv_freq
    assert torch.equal(inv_freq, whole.rotary_emb.inv_freq)
    halves = reference.load("bf16").parameters()
    assert {each.dtype for each in halves} == {torch.bfloat16}


def test_a_missing_tensor_is_not_filled_in(checkpoints, copied):
    """transformers would take random numbers for it."""
    folder = copied(checkpoints("kv2"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight .* is missing"):
        open_live(folder, task="embedding", max_length=64)


def test_no_such_reference(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_live(tmp_path / "nothing", task="embedding", max_length=64)


@pytest.mark.parametrize("package", ["torch", "transformers", "sentence_transformers"])
def test_without_a_package(monkeypatch, checkpoints, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"^{package} .*pip install 'embedport\[torch\]'"
    ):
        open_live(checkpoints("kv2"), task="embedding", max_length=64)


def on_cuda(reference):
    """The reference as if it were to run on a GPU."""
    reference.device = "cuda"
    reference.origin = replace(reference.origin, device="cuda")
    return reference


def test_where_and_in_what(monkeypatch, opened):
    import torch

    reference = opened("embedding")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cuda") == "cpu"
    assert reference.arithmetics() == ("fp32",)
    assert reference.origin.describe("fp32") == "fp32 on fp16-rounded weights, cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == find_device("tensorrt") == "cuda"
    assert find_device("cpu") == "cpu"
    reference = on_cuda(reference)
    need = reference.spec.parameters * 4 * module.HEADROOM
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(need) + 1, 0))
    assert reference.arithmetics() == ("fp16", "fp32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(need) - 1, 0))
    assert reference.arithmetics() == ("fp16", "bf16")
    assert reference.origin.describe("fp16") == "fp16, cuda"


def test_memory_that_torch_keeps_counts_as_free(monkeypatch, opened):
    """The memory of a deleted model that only the garbage collector finds."""
    import torch

    class Model:
        def __init__(self):
            self.itself = self

    reference = on_cuda(opened("embedding"))
    need = int(reference.spec.parameters * 4 * module.HEADROOM) + 1
    model = Model()
    there, cached = weakref.ref(model), [need]

    def empty_cache():
        if there() is None:
            cached.clear()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (need - sum(cached), need))
    gc.disable()
    del model
    try:
        assert reference.arithmetics() == ("fp16", "fp32")
    finally:
        gc.enable()


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_full_gpu_is_said(monkeypatch, opened, task):
    import torch

    def full(*args, **options):
        raise torch.OutOfMemoryError

    reference = opened(task)
    model = reference.load("fp32")
    with monkeypatch.context() as changes:
        changes.setattr(reference, "load", lambda *args: model)
        changes.setattr(type(model), "forward", full)
        with pytest.raises(InputError, match=r"a batch of 2 x 3 tokens of the reference in fp32"):
            reference.run_rows([[5, 6, 7], [8, 9]], "fp32")
    monkeypatch.setattr(type(model), "to", full)
    with pytest.raises(DeviceError, match=r"reference in bf16 does not fit .*device='cpu'"):
        reference.load("bf16")


def test_the_users_progress_bars_come_back(opened):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    opened("embedding").load("fp32")
    assert logging.is_progress_bar_enabled() == before


def test_shards_and_reranker_names(tmp_path, small_tokenizer):
    """The hub's other layout: several shards."""
    from tests.synthetic import TINY, write_checkpoint

    folder = write_checkpoint(
        tmp_path / "sharded", TINY, "reranker", small_tokenizer, shard_bytes=100_000
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    reference = open_live(folder, task="reranker", max_length=2048)
    single = shutil.copytree(folder, tmp_path / "single")
    tensors = {}
    for shard in sorted(single.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (single / "model.safetensors.index.json").unlink()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    other = open_live(single, task="reranker", max_length=2048)
    np.testing.assert_array_equal(reference.run(PAIRS[:3], "fp32"), other.run(PAIRS[:3], "fp32"))


@pytest.mark.parametrize("wide", [None, "norm.weight", "layers.1.self_attn.k_norm.weight"])
def test_weights_are_rounded_where_none_is_fp32(checkpoints, copied, wide):
    folder = copied(checkpoints("kv2"))
    tensors = load_file(folder / "model.safetensors")
    if wide is not None:
        tensors[wide] = tensors[wide].astype(np.float32) + np.float32(1e-5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference = open_live(folder, task="embedding", device="cpu")
    assert reference.origin.stored == ("bf16" if wide is None else "fp32")
    loaded = reference.load("fp32").state_dict()
    for name, tensor in tensors.items():
        found = next(loaded[key] for key in loaded if f".{key}".endswith(f".{name}")).numpy()
        kept = tensor.astype(np.float32) if wide else tensor.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, kept)


def test_weights_are_kept_where_a_dense_module_is_fp32(checkpoints, copied):
    folder = copied(checkpoints("kv2"))
    spec = open_live(folder, task="embedding", device="cpu").spec
    dense = Dense("2_Dense", 64, 8, bias=False, activation="Tanh")
    spec = replace(spec, outputs=replace(spec.outputs, steps=(dense,)))
    (folder / "2_Dense").mkdir()
    for dtype, expected in ((np.float16, "bf16"), (np.float32, "fp32")):
        tensors = {"linear.weight": np.ones((8, 64), dtype)}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
        assert module.widest_float(spec) == expected
