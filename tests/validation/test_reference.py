"""The reference against our own tokenization, and against transformers run by hand."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedport.demo.samples import Pair, Sample, builtin_pairs, builtin_samples
from embedport.errors import CheckpointError, DeviceError, InputError, MissingPackageError
from embedport.prompts import EmbeddingTokenizer, RerankerTokenizer, query_prompt
from embedport.validation import reference as module
from embedport.validation.reference import (
    choose_arithmetics,
    describe,
    embedding_ids,
    find_device,
    load_model,
    open_reference,
    reranker_ids,
    run_reference,
)

ODD = ["", " \n", "e\u0301", "<|im_end|> inside", "👩‍👩‍👧‍👦", "a" * 3000]
SAMPLES = [*builtin_samples(), *map(Sample, ODD), Sample("x", query_prompt("Find the statute"))]
PAIRS = [*builtin_pairs(), *(Pair("q", text) for text in ODD)]


@pytest.fixture(scope="module")
def opened(checkpoints):
    """A function (task, max_length) -> Reference."""
    return lambda task, max_length=512: open_reference(
        checkpoints("kv2", task), task=task, max_length=max_length
    )


@pytest.mark.parametrize("max_length", [512, 33])
def test_embedding_ids(opened, max_length):
    reference = opened("embedding", max_length)
    folder = reference.spec.source.folder
    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", max_length)
    prompts = reference.spec.prompts
    found = [
        tokenizer.encode([s.text], prompts.get(s.prompt, s.prompt)).ids[0].tolist() for s in SAMPLES
    ]
    assert embedding_ids(reference, SAMPLES) == found


def test_embedding_ids_under_the_checkpoints_own_prompts(checkpoints, copied):
    folder = copied(checkpoints("kv2"))
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "find: ", "document": "is: "}}))
    reference = open_reference(folder, task="embedding", max_length=64)
    own = embedding_ids(reference, [Sample("a", "query"), Sample("a")])
    path.unlink()
    assert own == embedding_ids(reference, [Sample("find: a"), Sample("is: a")])


def test_embedding_ids_of_the_first_tokenizers(checkpoints, copied):
    """They did not end a text with <|endoftext|>; the model card's code did."""
    folder = copied(checkpoints("kv2"))
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "post_processor": None}))
    reference = open_reference(folder, task="embedding", max_length=33)
    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", 33)
    samples = [Sample(text) for text in ["", "short", "long " * 99]]
    found = embedding_ids(reference, samples)
    assert found == [ids.tolist() for ids in tokenizer.encode([s.text for s in samples]).ids]
    assert len(found[0]) == 1
    assert len(found[2]) == 33


@pytest.mark.parametrize("max_length", [2048, 400])
def test_reranker_ids(opened, max_length):
    reference = opened("reranker", max_length)
    tokenizer = RerankerTokenizer(reference.spec.source.folder / "tokenizer.json", max_length)
    found = tokenizer.encode([(pair.query, pair.document) for pair in PAIRS])
    assert reranker_ids(reference, PAIRS) == [ids.tolist() for ids in found.ids]
    assert found.truncated


def test_vectors_are_the_last_tokens(opened):
    """In a ragged, left-padded batch as from the text alone, after the final norm, unit length."""
    import torch

    reference = opened("embedding")
    rows = embedding_ids(reference, SAMPLES[::6])
    vectors = run_reference(reference, rows, "fp32", "cpu")
    model = load_model(reference, "fp32", "cpu")
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
    rows = reranker_ids(reference, PAIRS[:5])
    scores = run_reference(reference, rows, "fp32", "cpu")
    model = load_model(reference, "fp32", "cpu")
    vocabulary = reference.tokenizer.get_vocab()
    for row, score in zip(rows, scores, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([row])).logits[0, -1].double().numpy()
        no, yes = np.exp(logits[[vocabulary["no"], vocabulary["yes"]]])
        assert score == pytest.approx(yes / (yes + no), abs=1e-6)
    assert scores.shape == (5,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp32_is_on_weights_rounded_to_fp16_unless_they_are_fp32(tmp_path, small_tokenizer, dtype):
    """And nothing but the weights is rounded: not the rotary frequencies."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    from embedport.demo.synthetic import TINY, write_checkpoint

    folder = write_checkpoint(tmp_path / "small", TINY, "embedding", small_tokenizer, dtype=dtype)
    path = folder / "model.safetensors"
    # So small that bf16 has digits that fp16 lacks.
    small = {name: weight * 2.0**-14 for name, weight in load_file(path).items()}
    save_file(small, path, metadata={"format": "pt"})
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32)
    reference = open_reference(folder, task="embedding", max_length=64)
    model = load_model(reference, "fp32", "cpu")
    found = dict(model.named_parameters())
    for name, weight in whole.named_parameters():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], weight if dtype == "float32" else weight.half().float())
    assert not torch.equal(whole.embed_tokens.weight.half().float(), whole.embed_tokens.weight)
    assert torch.equal(model.rotary_emb.inv_freq, whole.rotary_emb.inv_freq)
    halves = load_model(reference, "bf16", "cpu").parameters()
    assert {each.dtype for each in halves} == {torch.bfloat16}


def test_a_missing_tensor_is_not_filled_in(checkpoints, copied):
    """transformers would take random numbers for it."""
    folder = copied(checkpoints("kv2"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight .* is missing"):
        open_reference(folder, task="embedding", max_length=64)


def test_no_such_reference(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_reference(tmp_path / "nothing", task="embedding", max_length=64)


def test_without_torch(monkeypatch, checkpoints):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'embedport\[torch\]'"):
        open_reference(checkpoints("kv2"), task="embedding", max_length=64)


def test_where_and_in_what(monkeypatch, opened):
    import torch

    reference = opened("embedding")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cuda") == "cpu"
    assert choose_arithmetics(reference, "cpu") == ("fp32",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == find_device("tensorrt") == "cuda"
    assert find_device("cpu") == "cpu"
    need = reference.spec.parameters * 4 * module.HEADROOM
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(need) + 1, 0))
    assert choose_arithmetics(reference, "cuda") == ("fp16", "fp32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(need) - 1, 0))
    assert choose_arithmetics(reference, "cuda") == ("fp16", "bf16")
    assert describe(reference, "fp32", "cpu") == "fp32 on fp16-rounded weights, cpu"
    assert describe(reference, "fp16", "cuda") == "fp16, cuda"


def test_memory_that_torch_keeps_counts_as_free(monkeypatch, opened):
    """Of a model that is gone, and that only the collector finds."""
    import torch

    class Model:
        def __init__(self):
            self.itself = self

    reference = opened("embedding")
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
        assert choose_arithmetics(reference, "cuda") == ("fp16", "fp32")
    finally:
        gc.enable()


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_full_gpu_is_said(monkeypatch, opened, task):
    import torch

    def full(*args, **options):
        raise torch.OutOfMemoryError

    model = load_model(opened(task), "fp32", "cpu")
    with monkeypatch.context() as changes:
        changes.setattr(module, "load_model", lambda *args: model)
        changes.setattr(type(model), "forward", full)
        with pytest.raises(InputError, match=r"a batch of 2 x 3 tokens of the reference in fp32"):
            run_reference(opened(task), [[5, 6, 7], [8, 9]], "fp32", "cpu")
    monkeypatch.setattr(type(model), "to", full)
    with pytest.raises(DeviceError, match=r"reference in bf16 does not fit .*device='cpu'"):
        load_model(opened(task), "bf16", "cpu")


def test_the_users_progress_bars_come_back(opened):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(opened("embedding"), "fp32", "cpu")
    assert logging.is_progress_bar_enabled() == before


def test_shards_and_reranker_names(tmp_path, small_tokenizer):
    """The hub's other layout: several shards."""
    from embedport.demo.synthetic import TINY, write_checkpoint

    folder = write_checkpoint(
        tmp_path / "sharded", TINY, "reranker", small_tokenizer, shard_bytes=100_000
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    reference = open_reference(folder, task="reranker", max_length=2048)
    single = shutil.copytree(folder, tmp_path / "single")
    tensors = {}
    for shard in sorted(single.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (single / "model.safetensors.index.json").unlink()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    rows = reranker_ids(reference, PAIRS[:3])
    other = open_reference(single, task="reranker", max_length=2048)
    np.testing.assert_array_equal(
        run_reference(reference, rows, "fp32", "cpu"), run_reference(other, rows, "fp32", "cpu")
    )
