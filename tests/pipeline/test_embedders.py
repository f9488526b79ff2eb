"""Embedders as their files declare them, against SentenceTransformer."""

import json
import os
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError, DeviceError, InputError
from embedport.serve.models import ServedEmbedder
from tests.synthetic import edit

from .conftest import (
    LAST,
    MESSAGES,
    TANH,
    TEXTS,
    UNIT,
    add_biases,
    end_texts_with,
    messages,
    open_embedder,
    write_json,
)

REPLACE = {"type": "Replace", "pattern": {"String": "A"}, "content": "x"}


def sentence_transformer(folder, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


def check(folder, tmp_path, expected=None, atol=1e-5, **options):
    """Checkpoint and graph against encode."""
    if expected is None:
        expected = sentence_transformer(folder).encode(TEXTS)
    found = open_embedder(folder).encode(TEXTS, **options)
    np.testing.assert_allclose(found, expected, atol=atol)
    embedport.export(folder, tmp_path / "artifact")
    found = open_embedder(tmp_path / "artifact").encode(TEXTS, **options)
    np.testing.assert_allclose(found, expected, atol=atol)
    return expected


@pytest.mark.parametrize(
    "end",
    ["<|endoftext|>", *(pytest.param(end, marks=pytest.mark.slow) for end in (None, "<|im_end|>"))],
)
def test_tokens_as_the_tokenizer_gives_them(tmp_path, real_tokenizer, end):
    """Qwen3's own vocabulary, with each ending and with none."""
    from tests.synthetic import Geometry, write_checkpoint

    folder = tmp_path / "model"
    write_checkpoint(
        folder, Geometry(32, 2, 2, 1, 16, 64), "embedding", real_tokenizer, dtype="float32"
    )
    end_texts_with(folder, end)
    model = sentence_transformer(folder)
    embedder = open_embedder(folder)
    for ids, text in zip(embedder.tokenizer.encode(TEXTS).ids, TEXTS, strict=True):
        assert ids.tolist() == model.preprocess([text])["input_ids"][0].tolist()
    np.testing.assert_allclose(embedder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_no_prompt_is_invented(with_modules):
    folder = with_modules(LAST, UNIT)
    model, embedder = sentence_transformer(folder), open_embedder(folder)
    found = embedder.encode(TEXTS, prompt="query")
    np.testing.assert_allclose(found, model.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(found, embedder.encode(TEXTS, prompt="document"), atol=1e-6)
    (folder / "config_sentence_transformers.json").unlink()
    assert ModelSpec.from_checkpoint(folder).prompts == {}


def test_prompts_of_other_names(with_modules, tmp_path):
    """Calibration takes the prompts there are."""
    prompts = {"retrieve": "Find this: ", "classify": "Name it: "}
    folder = with_modules(LAST, UNIT, prompts=prompts)
    artifact = embedport.export(
        folder, tmp_path / "int4", precision="int4", algorithm="awq", group_size=32
    )
    assert artifact.manifest.prompts == prompts
    embedder = open_embedder(folder)
    for name in prompts:
        expected = sentence_transformer(folder).encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(embedder.encode(TEXTS, prompt=name), expected, atol=1e-5)
    with pytest.raises(InputError, match="no prompt is named 'summarize'; there are classify"):
        embedder.encode(TEXTS, prompt="summarize")


def test_the_default_prompt(with_modules, tmp_path):
    prompts = {"own": "Think of this: ", "query": None}
    folder = with_modules(LAST, UNIT, prompts=prompts, default="own")
    expected = check(folder, tmp_path)
    plain = sentence_transformer(folder).encode(TEXTS, prompt="")
    assert np.abs(expected - plain).max() > 0.01
    # The artifact keeps it, for sentence-transformers too.
    settings = json.loads((tmp_path / "artifact/config_sentence_transformers.json").read_text())
    assert settings["default_prompt_name"] == "own"
    edit(folder / "config_sentence_transformers.json", default_prompt_name="other")
    with pytest.raises(CheckpointError, match="default_prompt_name is 'other'"):
        ModelSpec.from_checkpoint(folder)


CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("style", ["flat", "structured", "auto"])
def test_texts_through_the_chat_template(with_modules, tmp_path, style):
    first = messages("feature-extraction", style)
    # The prompt is a message of its own, and is pooled all the same.
    mean = {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": False}
    prompts = {"q": "Be brief."}
    folder = with_modules(("Pooling", mean), UNIT, prompts=prompts, default="q", first=first)
    chat = CHAT.replace("message.content", "message.content[0].text") if style != "flat" else CHAT
    (folder / "chat_template.jinja").write_text(chat)
    check(folder, tmp_path)


def test_several_chat_templates(with_modules):
    """The one named default, and parts: sentence-transformers infers them from the list."""
    folder = with_modules(LAST, UNIT, first=messages("feature-extraction", "auto"))
    templates = [
        {"name": "other", "template": "no"},
        {"name": "default", "template": CHAT.replace("message.content", "message.content[0].text")},
    ]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    found, expected = open_embedder(folder), sentence_transformer(folder).encode(TEXTS)
    np.testing.assert_allclose(found.encode(TEXTS), expected, atol=1e-5)
    edit(folder / "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(CheckpointError, match="has no chat template"):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_generation_prompt_and_a_long_text(with_modules, side):
    first = {
        **MESSAGES,
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        "max_seq_length": 24,
    }
    folder = with_modules(LAST, UNIT, first=first)
    chat = CHAT + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    edit(folder / "tokenizer_config.json", chat_template=chat, truncation_side=side)
    texts = [*TEXTS, "x " * 100]
    found = open_embedder(folder).encode(texts)
    np.testing.assert_allclose(found, sentence_transformer(folder).encode(texts), atol=1e-5)


def test_a_prompt_left_out_of_the_pooling_with_nothing_behind_it(with_modules):
    pooling = {"embedding_dimension": 64, "pooling_mode": "lasttoken", "include_prompt": False}
    folder = with_modules(("Pooling", pooling), prompts={"own": "Say: "}, default="own")
    end_texts_with(folder, None)
    expected = sentence_transformer(folder).encode(["tea", ""])
    assert not expected[1].any()
    embedder = open_embedder(folder)
    np.testing.assert_allclose(embedder.encode(["tea"]), expected[:1], atol=1e-5)
    message = "text 1 has no token behind the prompt's 4"
    with pytest.raises(InputError, match=message):
        embedder.encode(["tea", ""])
    with pytest.raises(InputError, match=message):
        ServedEmbedder("own", embedder, None).tokenize(["tea", ""], None, truncate=False)


def test_a_template_that_reads_the_task_is_refused(with_modules):
    """encode_query sets it, so the library itself gives a query other tokens than a text."""
    folder = with_modules(LAST, UNIT, first=MESSAGES)
    (folder / "chat_template.jinja").write_text("{% if task == 'query' %}find {% endif %}" + CHAT)
    model = sentence_transformer(folder)
    assert np.abs(model.encode_query(TEXTS) - model.encode(TEXTS)).max() > 0.01
    with pytest.raises(CheckpointError, match="the chat template reads task"):
        ModelSpec.from_checkpoint(folder)
    values = {"chat_template": {"task": "query"}}
    edit(folder / "sentence_bert_config.json", processing_kwargs=values)
    expected = sentence_transformer(folder).encode(TEXTS)
    np.testing.assert_allclose(open_embedder(folder).encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "named"),
    [("<|im_start|>", None), ("<|im_start|>", ["<|im_start|>"]), ("<|im_end|>", None)],
)
def test_a_prompt_left_out_of_the_pooling(with_modules, end, named):
    """A token at its end belongs to it unless the tokenizer's files name that as special."""
    pooling = {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": False}
    folder = with_modules(("Pooling", pooling), UNIT, prompts={"own": "Say: "}, default="own")
    end_texts_with(folder, end)
    edit(folder / "tokenizer_config.json", additional_special_tokens=named)
    model, embedder = sentence_transformer(folder), open_embedder(folder)
    np.testing.assert_allclose(embedder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    expected = model.encode(TEXTS, prompt="")
    np.testing.assert_allclose(embedder.encode(TEXTS, prompt=""), expected, atol=1e-5)


def test_vectors_that_are_not_normalized(with_modules, tmp_path):
    folder = with_modules(LAST)
    expected = check(folder, tmp_path)
    assert np.linalg.norm(expected, axis=1).min() > 2
    embedder = open_embedder(tmp_path / "artifact")
    short = sentence_transformer(folder, truncate_dim=16).encode(TEXTS)
    np.testing.assert_allclose(embedder.encode(TEXTS, dim=16), short, atol=1e-5)
    embedport.export(folder, tmp_path / "narrow", dim=16)
    narrow = open_embedder(tmp_path / "narrow")
    np.testing.assert_allclose(narrow.encode(TEXTS), short, atol=1e-5)
    names = [each["type"] for each in json.loads((tmp_path / "artifact/modules.json").read_text())]
    assert names == [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling")]


def test_a_declared_width(with_modules, tmp_path):
    """truncate_dim keeps a prefix and does not normalize it again."""
    folder = with_modules(LAST, UNIT, settings={"truncate_dim": 24})
    expected = check(folder, tmp_path)
    assert expected.shape[1] == 24
    assert np.linalg.norm(expected, axis=1).max() < 0.95


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter_to_attention_both_ways(with_modules, tmp_path, side):
    folder = with_modules(("Pooling", {"embedding_dimension": 64, "pooling_mode": "mean"}), UNIT)
    edit(folder / "config.json", is_causal=False)
    expected = check(folder, tmp_path)
    edit(folder / "config.json", is_causal=None)
    assert np.abs(sentence_transformer(folder).encode(TEXTS) - expected).max() > 0.01
    embedder = open_embedder(tmp_path / "artifact")
    for text, vector in zip(TEXTS, expected, strict=True):
        (ids,) = embedder.tokenizer.encode([text]).ids
        pad = np.zeros(7, np.int64)
        row = np.concatenate([pad, ids] if side == "left" else [ids, pad])[None]
        mask = np.concatenate([pad, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pad])[None]
        np.testing.assert_allclose(embedder.model(row, mask)[0], vector, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"type": "yarn", "factor": 2.0, "beta_fast": 16, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.3},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3},
    ],
)
def test_rope_scaling(with_modules, tmp_path, rope):
    folder = with_modules(LAST, UNIT)
    edit(folder / "config.json", rope_scaling=rope, rope_theta=10000.0, max_position_embeddings=512)
    check(folder, tmp_path)


def test_attention_biases(with_modules, tmp_path):
    folder = with_modules(LAST, UNIT)
    add_biases(folder, seed=9)
    expected = check(folder, tmp_path)
    # Rotated, balanced, and without scales that are left for later.
    for precision, least in (("int8", 0.995), ("int4", 0.9)):
        options: dict[str, Any] = {"group_size": 32, "algorithm": "awq"}
        options = options if precision == "int4" else {}
        embedport.export(folder, tmp_path / precision, precision=precision, **options)
        found = open_embedder(tmp_path / precision).encode(TEXTS)
        assert (found * expected).sum(axis=1).min() > least


def test_lower_case(with_modules, tmp_path):
    folder = with_modules(LAST, UNIT, first={"do_lower_case": True})
    check(folder, tmp_path)
    upper = open_embedder(folder).encode([text.upper() for text in TEXTS[:2]])
    lower = open_embedder(folder).encode([text.lower() for text in TEXTS[:2]])
    np.testing.assert_allclose(upper, lower, atol=1e-6)


LOWER = {"type": "Sequence", "normalizers": [REPLACE, {"type": "Lowercase"}]}


@pytest.mark.parametrize(
    "normalizer", [None, REPLACE, LOWER, {"type": "Sequence", "normalizers": [LOWER]}]
)
def test_lower_case_before_or_within_a_tokenizer_s_own_rules(with_modules, normalizer):
    """Texts are lowercased first, but for rules that do it themselves."""
    folder = with_modules(LAST, UNIT, first={"do_lower_case": True})
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    values = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    model, found = sentence_transformer(folder), open_embedder(folder).tokenizer.encode(["ABBA"])
    assert found.ids[0].tolist() == model.preprocess(["ABBA"])["input_ids"][0].tolist()


@pytest.mark.parametrize("changes", [{"truncation_side": "left"}, {"split_special_tokens": True}])
def test_the_tokenizer_s_settings(with_modules, tmp_path, changes):
    without_effect = {"torch_dtype": "float32", "attn_implementation": "eager", "subfolder": None}
    folder = with_modules(LAST, UNIT, first={"max_seq_length": 12, "model_kwargs": without_effect})
    edit(folder / "tokenizer_config.json", **changes)
    texts = [*TEXTS, "a <|im_end|> in the middle"]
    expected = sentence_transformer(folder).encode(texts)
    np.testing.assert_allclose(open_embedder(folder).encode(texts), expected, atol=1e-5)


def test_max_seq_length_comes_before_the_tokenizer_s(with_modules):
    folder = with_modules(LAST, UNIT, first={"max_seq_length": 300})
    edit(folder / "tokenizer_config.json", model_max_length=20)
    assert ModelSpec.from_checkpoint(folder).max_length == 300
    assert sentence_transformer(folder).max_seq_length == 300
    edit(folder / "sentence_bert_config.json", max_seq_length=32768)
    assert ModelSpec.from_checkpoint(folder).max_length == 32768
    edit(folder / "sentence_bert_config.json", max_seq_length=10**6)
    with pytest.raises(CheckpointError, match="max_seq_length is 1000000, and the model has 32768"):
        ModelSpec.from_checkpoint(folder)


def test_a_single_file_beside_an_index(with_modules, tmp_path):
    """transformers reads the single file."""
    folder = with_modules(LAST, UNIT)
    tensors = load_file(folder / "model.safetensors")
    other = {name: tensor[..., ::-1].copy() for name, tensor in tensors.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")},
    )
    check(folder, tmp_path)


def test_head_dim_and_key_heads_are_transformers_defaults(with_modules):
    folder = with_modules(LAST, UNIT)
    edit(folder / "config.json", head_dim=None)
    assert ModelSpec.from_checkpoint(folder).head_dim == 128
    # The largest; and a number that nothing reads without a window.
    edit(folder / "config.json", head_dim=256, max_window_layers=0, use_sliding_window=False)
    spec = ModelSpec.from_checkpoint(folder)
    assert (spec.head_dim, spec.window, spec.window_layers) == (256, None, ())


def test_hidden_states_go_through_the_same_modules(with_modules, tmp_path):
    dense = {"in_features": 64, "out_features": 32, "bias": True, "activation_function": TANH}
    pooling = {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": False}
    folder = with_modules(
        ("Pooling", pooling), ("Dense", dense), UNIT, prompts={"q": "Say: "}, default="q"
    )
    expected = sentence_transformer(folder).encode(TEXTS)
    embedport.export(folder, tmp_path / "hidden", outputs="hidden")
    found = open_embedder(tmp_path / "hidden").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shutil.rmtree(folder)  # the artifact has all that it needs
    found = open_embedder(tmp_path / "hidden").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_tokenizer_that_transformers_would_change_is_refused(with_modules):
    folder = with_modules(LAST, UNIT)
    edit(folder / "tokenizer_config.json", pad_token="<|pad|>")
    with pytest.raises(CheckpointError, match=r"pad_token names '<\|pad\|>', not an added"):
        open_embedder(folder)
    edit(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"normalizer is .*NFKC.*Qwen2Tokenizer is .*NFC"):
        open_embedder(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    expected = sentence_transformer(folder).encode(TEXTS)
    found = open_embedder(folder).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_pickled_checkpoint(with_modules):
    embedder = open_embedder(with_modules(LAST, UNIT))
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


def test_a_model_opened_before_a_fork_goes_on(with_modules):
    """Threads of torch and of the tokenizer are missing in the child."""
    embedder = open_embedder(with_modules(LAST, UNIT))
    expected = embedder.encode(TEXTS)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion here: pytest's own state was forked too
        try:
            os.write(write, embedder.encode(TEXTS).tobytes())
        except Exception as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = os.read(read, 2 * expected.nbytes)
    np.testing.assert_allclose(np.frombuffer(found, np.float32), expected.ravel(), atol=1e-6)


def test_a_model_on_a_gpu_does_not_survive_a_fork(with_modules, monkeypatch):
    embedder = open_embedder(with_modules(LAST, UNIT))
    monkeypatch.setattr(embedder.model, "device", "cuda")
    monkeypatch.setattr(embedder.model, "_pid", -1)
    with pytest.raises(DeviceError, match="opened before this process was forked"):
        embedder.encode(TEXTS)
