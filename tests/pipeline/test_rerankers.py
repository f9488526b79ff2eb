"""Rerankers as their files declare them, against CrossEncoder."""

import json
import shutil
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError, InputError
from embedport.runtimes import read_info
from embedport.texts.samples import Pair
from embedport.validation.companions import files_gate
from embedport.validation.graphs import Few, graph_gates
from embedport.validation.invariance import pad
from tests.synthetic import edit

from .conftest import (
    PAIRS,
    ROLES,
    change_tensors,
    end_texts_with,
    messages,
    open_reranker,
    write_json,
)

PROBES = True
TEXT = {"transformer_task": "text-generation"}


def cross_encoder(folder):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu")


def check(folder, tmp_path, **options):
    """Checkpoint and graph against CrossEncoder.predict."""
    expected = np.asarray(cross_encoder(folder).predict(PAIRS, **options))
    assert np.ptp(expected) > 1e-3
    found = open_reranker(folder).score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    artifact = embedport.export(folder, tmp_path / "artifact")
    found = open_reranker(artifact.folder).score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    return expected


def test_a_token_that_is_0(with_score, small_tokenizer):
    folder = with_score()
    edit(folder / "1_LogitScore" / "config.json", true_token_id=0)
    answers = (0, small_tokenizer.token_to_id("no"))
    assert ModelSpec.from_checkpoint(folder).outputs.answers == answers


@pytest.mark.parametrize(
    ("yes", "no", "settings"),
    [
        ("yes", "no", {}),
        ("Ġthe", "Ġof", {"prompts": {"own": "Find a drink."}, "default_prompt_name": "own"}),
        ("Ġthe", None, {"activation_fn": "torch.nn.modules.linear.Identity"}),
        ("Ġa", None, {"activation_fn": "torch.nn.modules.activation.Sigmoid"}),
    ],
)
def test_logit_score(with_score, tmp_path, yes, no, settings):
    check(with_score(yes, no, **settings), tmp_path)


@pytest.mark.parametrize(
    "declared",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
)
def test_logit_score_with_an_activation_in_config_json(with_score, declared):
    """CrossEncoder looks there for every model whose own settings name none."""
    folder = with_score()
    edit(folder / "config.json", **declared)
    expected = np.asarray(cross_encoder(folder).predict(PAIRS))
    np.testing.assert_allclose(open_reranker(folder).score(PAIRS), expected, atol=1e-5)
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    edit(folder / "config_sentence_transformers.json", activation_fn=sigmoid)
    assert ModelSpec.from_checkpoint(folder).outputs.activation == "sigmoid"


def test_an_activation_beside_the_model_cards_template(descend):
    folder = descend("reranker")
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    edit(folder / "config.json", sentence_transformers=identity)
    with pytest.raises(CheckpointError, match=r"by the model card, .* a score is a probability"):
        ModelSpec.from_checkpoint(folder)


def test_a_pair_of_texts(with_score, tmp_path):
    folder = with_score(first=TEXT, chat=None, prompts={"p": "Judge: "}, default_prompt_name="p")
    check(folder, tmp_path)


def test_a_structured_template(with_score, tmp_path):
    chat = ROLES.replace(
        "map(attribute='content') | first", "map(attribute='content.0.text') | first"
    )
    check(with_score(first=messages("text-generation", "structured"), chat=chat), tmp_path)


def test_a_long_pair_keeps_the_template_s_end(with_score):
    first = messages("text-generation", "flat") | {"max_seq_length": 60}
    folder = with_score(first=first)
    pairs = [*PAIRS, ("tea", "water " * 200), ("x " * 100, "y")]
    expected = cross_encoder(folder).predict(pairs)
    found = open_reranker(folder).score(pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("chat", [None, ROLES])
def test_classifier(classifier, tmp_path, chat):
    check(classifier(1, chat), tmp_path)


def test_classifier_with_an_end_token_that_is_its_padding(classifier, small_tokenizer, tmp_path):
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    end_texts_with(folder, "<|endoftext|>")
    check(folder, tmp_path)
    options: Any = {"pairs": PAIRS[:2], "device": "cpu", "record": False}
    assert embedport.validate(folder, folder, **options).passed
    # The others would see it: CrossEncoder gives another score without it.
    edit(folder / "config.json", is_causal=False)
    with pytest.raises(InputError, match="pair 0 ends with the padding token"):
        open_reranker(folder).score(PAIRS)


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"dialect": "standard"}])
def test_other_software_of_a_classifier_whose_tokenizer_appends_its_padding(
    classifier, small_tokenizer, tmp_path, options
):
    """CrossEncoder in torch skips it; other software passes it to the graph with a mask of 1."""
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    end_texts_with(folder, "<|endoftext|>")
    artifact = embedport.export(folder, tmp_path / "artifact", **options)
    model = embedport.load_reranker(artifact.folder, device="cpu")
    session = ort.InferenceSession(artifact.graph, providers=["CPUExecutionProvider"])
    rows = [row.ids for row in model.tokenizer.tokenizer.encode_batch(PAIRS)]
    assert {row[-1] for row in rows} == {small_tokenizer.token_to_id("<|endoftext|>")}
    for side in ("left", "right"):
        ids, mask = pad([np.array(row) for row in rows], side, 2)
        found = np.array(session.run(["score"], {"input_ids": ids, "attention_mask": mask})[0])
        np.testing.assert_allclose(found, model.score(PAIRS), atol=1e-5)


def test_a_graph_that_reads_padding_which_its_tokenizer_appends(
    classifier, small_tokenizer, tmp_path, monkeypatch
):
    """As exports of earlier versions have it: `validate` runs it with that padding."""
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    end_texts_with(folder, "<|endoftext|>")

    def verdict(name):
        artifact = embedport.export(folder, tmp_path / name).folder
        info, model = read_info(artifact), embedport.load_reranker(artifact, device="cpu")
        few = Few(model.tokenizer.encode(PAIRS).ids, model.score(PAIRS))
        (gate,) = graph_gates(info, "cpu", few)
        return gate

    assert verdict("now").value == 0
    monkeypatch.setattr(
        "embedport.exporters.graph.qwen3.count_to_last",
        lambda g, ids, mask, skipped: g.op("ReduceSum", mask, g.constant([1]), keepdims=1),
    )
    gate = verdict("before")
    assert gate.failed
    assert "onnx/model.onnx: score is" in gate.detail


def test_files_of_a_reranker_whose_tokenizer_appends_its_padding(
    classifier, with_score, small_tokenizer, tmp_path
):
    """Only a classifier skips it."""
    pairs = [Pair(*pair) for pair in PAIRS]
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    end_texts_with(folder, "<|endoftext|>")
    artifact = embedport.export(folder, tmp_path / "classifier").folder
    (gate,) = files_gate(read_info(artifact), {}, pairs)
    assert (gate.value, gate.detail) == (0, "")
    shutil.rmtree(folder)
    folder = with_score(first=messages("text-generation"), chat=None)
    end_texts_with(folder, "<|endoftext|>")
    artifact = embedport.export(folder, tmp_path / "artifact").folder
    (gate,) = files_gate(read_info(artifact), {}, pairs)
    assert (gate.value, gate.detail) == (0, "")


def test_a_text_that_ends_with_padding(classifier, small_tokenizer):
    """Attention to one side does not see it, and attention to both sides does."""
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    pairs = [("tea", "a drink<|endoftext|>")]
    expected = cross_encoder(folder).predict(pairs)
    np.testing.assert_allclose(open_reranker(folder).score(pairs), expected, atol=1e-5)
    edit(folder / "config.json", is_causal=False)
    without, expected = cross_encoder(folder).predict([("tea", "a drink"), *pairs])
    assert abs(without - expected) > 1e-4
    with pytest.raises(InputError, match="ends with the padding token"):
        open_reranker(folder).score(pairs)
    found = open_reranker(folder).score([("tea", "a drink")])
    np.testing.assert_allclose(found, without, atol=1e-5)


def test_padding_on_the_right_that_is_not_skipped(classifier):
    """transformers scores the shorter pair by its padding, and each batch otherwise."""
    folder = classifier(1)  # pad_token_id is <|im_end|>, and the padding <|endoftext|>
    expected = cross_encoder(folder).predict(PAIRS)  # on the left
    np.testing.assert_allclose(open_reranker(folder).score(PAIRS), expected, atol=1e-5)
    edit(folder / "tokenizer_config.json", padding_side="right")
    found = cross_encoder(folder)
    together, alone = found.predict(PAIRS), found.predict(PAIRS[:1])
    assert abs(together[0] - alone[0]) > 1e-3
    with pytest.raises(CheckpointError, match=r"pad_token_id should be 1019.* found 1021"):
        ModelSpec.from_checkpoint(folder)
    edit(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    expected = cross_encoder(folder).predict(PAIRS)
    np.testing.assert_allclose(open_reranker(folder).score(PAIRS), expected, atol=1e-5)


def test_validate_notices_a_padding_token_that_is_not_skipped(
    classifier, small_tokenizer, tmp_path
):
    folder = classifier(1, pad_token_id=small_tokenizer.token_to_id("<|endoftext|>"))
    artifact = embedport.export(folder, tmp_path / "artifact").folder
    options: Any = {"pairs": PAIRS[:2], "device": "cpu", "record": False}
    assert embedport.validate(artifact, folder, **options).passed
    manifest = json.loads((artifact / "embedport.json").read_text())
    manifest["inputs"]["skipped_token"] = None
    write_json(artifact / "embedport.json", manifest)
    (gate,) = embedport.validate(artifact, folder, **options).gates
    assert gate.failed
    assert "end<|endoftext|>" in gate.detail


def test_classifier_with_two_labels(classifier):
    folder = classifier(2)
    expected = cross_encoder(folder).predict(PAIRS, apply_softmax=True)[:, 1]
    found = open_reranker(folder).score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_labels": 1}, "num_labels is 1 and id2label has 2 labels"),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}},
            "a Sigmoid for each of two labels",
        ),
    ],
)
def test_two_labels_refused(classifier, config, message):
    """The library fails on the first; with the second its two scores do not add up to 1."""
    folder = classifier(2, **config)
    if "num_labels" in config:
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            cross_encoder(folder)
    else:
        assert np.abs(cross_encoder(folder).predict(PAIRS).sum(axis=1) - 1).max() > 1e-3
    with pytest.raises(CheckpointError, match=message):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": ["no", "yes"]}, "id2label should be an object"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "should have one label, yes, or two.* 3"),
        ({"id2label": None, "num_labels": 3}, "should have one label, yes, or two.* found 3"),
    ],
)
def test_labels_refused(classifier, config, message):
    folder = classifier(1)
    edit(folder / "config.json", **config)
    with pytest.raises(CheckpointError, match=message):
        ModelSpec.from_checkpoint(folder)


def test_classifier_with_another_activation(classifier, tmp_path):
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    check(classifier(1, sentence_transformers=identity), tmp_path)
    folder = tmp_path / "model"
    edit(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.ReLU"})
    with pytest.raises(CheckpointError, match=r"only torch\.nn's Sigmoid and Identity"):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    "chat",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'query' %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('only users') }}",
    ],
)
def test_a_template_without_the_two_roles_is_refused(classifier, chat):
    folder = classifier(1, chat)
    with pytest.raises(ValueError, match="cannot carry a 'query'/'document' pair"):
        cross_encoder(folder).predict(PAIRS)
    with pytest.raises(CheckpointError, match="does not render the roles 'query' and 'document'"):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize("listed", [None, False])
def test_a_tied_head_beside_one_of_its_own(descend, tmp_path, listed):
    """transformers takes the head that is there; the reference is its own softmax.

    It also takes one in a shard whose index does not list it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = descend("reranker")
    generator = np.random.default_rng(5)

    def add_head(tensors):
        shape = tensors["model.embed_tokens.weight"].shape
        tensors["lm_head.weight"] = generator.standard_normal(shape).astype(np.float32)

    change_tensors(folder, add_head)
    if listed is False:
        path = folder / "model.safetensors"
        shard = path.rename(folder / "model-00001-of-00001.safetensors")
        names = set(load_file(shard)) - {"lm_head.weight"}
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reranker = open_reranker(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = [reranker.tokenizer.tokenizer.token_to_id(word) for word in ("no", "yes")]
    expected = []
    for ids in reranker.tokenizer.encode(PAIRS).ids:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids)[None]).logits[0, -1, answers]
        expected.append(float(logits.softmax(0)[1]))
    np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=1e-5)
    embedport.export(folder, tmp_path / "artifact")
    found = open_reranker(tmp_path / "artifact").score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_plain_language_model_asks_for_the_task(descend):
    folder = descend("reranker")
    (folder / "README.md").write_text("---\npipeline_tag: text-generation\n---\nA model.\n")
    with pytest.raises(InputError, match=r"its files do not state the task.*`task`"):
        ModelSpec.from_checkpoint(folder)
    with pytest.raises(InputError, match="`task` embedding or `task` reranker"):
        embedport.load(folder, device="cpu")
    assert isinstance(embedport.load(folder, device="cpu", task="embedding"), embedport.Embedder)
    assert isinstance(embedport.load_embedder(folder, device="cpu"), embedport.Embedder)
    assert isinstance(embedport.load(folder, device="cpu", task="reranker"), embedport.Reranker)
    for header in (
        "tags:\n- transformers\n- reranker",
        "tags: [transformers, reranker]\nbase_model: Qwen/Qwen3-Embedding-0.6B",
        "pipeline_tag: text-ranking  # not feature-extraction\ntags:\n- sentence-similarity",
        "base_model: Qwen/Qwen3-Reranker-0.6B",
        "base_model:\n- Qwen/Qwen3-Reranker-0.6B",
    ):
        (folder / "README.md").write_text(f"---\n{header}\n---\nA model.\n")
        assert ModelSpec.from_checkpoint(folder).task == "reranker"


def test_other_answer_tokens_without_modules_are_refused(descend):
    """vLLM reads this key; the model card's template asks for "yes" or "no"."""
    folder = descend("reranker")
    edit(folder / "config.json", classifier_from_token=["no", "yes"])
    assert ModelSpec.from_checkpoint(folder).task == "reranker"
    edit(folder / "config.json", classifier_from_token=["Yes"])
    with pytest.raises(CheckpointError, match=r"classifier_from_token is \['Yes'\], and only"):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_LogitScore/config.json", {"true_token_id": 5000}, "5000 is outside the vocabulary"),
        ("1_LogitScore/config.json", {"true_token_id": "yes"}, "should be a token's id"),
        ("1_LogitScore/config.json", {"module_input_name": "scores"}, "module_input_name"),
        ("1_LogitScore/config.json", {"temperature": 2}, "'temperature' is not known here"),
        (
            "config_sentence_transformers.json",
            {"model_type": "SentenceTransformer"},
            "LogitScore does not go with a SentenceTransformer|should be followed by Pooling",
        ),
        ("config_sentence_transformers.json", {"activation_fn": "my.Own"}, "only torch.nn's Sigm"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "should be one of feature",
        ),
    ],
)
def test_refused(with_score, file, changes, message):
    folder = with_score()
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelSpec.from_checkpoint(folder)
    assert str(folder) in str(caught.value)
