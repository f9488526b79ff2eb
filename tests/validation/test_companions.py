"""Files that other software reads beside the weights: one that says something else fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.runtimes import read_info
from embedport.texts.prompts import RerankerTokenizer
from embedport.texts.samples import Pair
from embedport.validation.companions import GATE, files_gate
from embedport.validation.recorded_file import read_recorded
from embedport.validation.settings import layer_settings

PAIRS = [Pair("What is tea?", "A leaf from China."), Pair("Snow?", "It is cold.")]
Change = Callable[[Path], object]
SETTINGS, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
CLS = {"pooling_mode_lasttoken": False, "pooling_mode_cls_token": True}


def gate_of(folder, settings=None):
    """The gate on an artifact's files, for `PAIRS` if it is a reranker."""
    info = read_info(folder)
    (gate,) = files_gate(info, settings or {}, PAIRS if info.task == "reranker" else [])
    return gate


def values(name: str, **changes: Any) -> Change:
    """A change of a JSON file's keys."""

    def change(folder: Path) -> None:
        path = folder / name
        present = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(present | changes))

    return change


def without_normalize(folder: Path) -> None:
    path = folder / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<Document>: ", "<Doc>: "))


def without_template(folder: Path) -> None:
    """The tokenizer's settings of a published reranker have a template too, one for chats."""
    (folder / "chat_template.jinja").unlink()
    chat = "{% for message in messages %}{{ message.content }}{% endfor %}"
    values("tokenizer_config.json", chat_template=chat)(folder)


def of_a_language_model(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    values("config.json", architectures=["Qwen3ForCausalLM"])(folder)


def without_instructions(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("'system'", "'developer'"))


def with_own_head(folder: Path) -> None:
    """A head beside a configuration that ties it to the table."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})


def last_token_is_padding(folder: Path) -> None:
    """transformers looks for a classifier's last token before its padding."""
    tokenizer = RerankerTokenizer(folder / "tokenizer.json", 256)
    values("config.json", pad_token_id=int(tokenizer.suffix[-1]))(folder)


EMBEDDER: list[tuple[Change, str]] = [
    (values(POOLING, **CLS), f"{POOLING}: pooling: found ('cls',), expected ('lasttoken',) as in"),
    (values(POOLING, include_prompt=False), f"{POOLING}: include_prompt: found False, expected T"),
    (without_normalize, "modules.json: steps: found (), expected ('normalize',)"),
    (values(SETTINGS, prompts={"query": "find: "}), f"{SETTINGS}: prompts: found {{'query': 'find"),
    (values(SETTINGS, default_prompt_name="query"), "default_prompt: found 'query', expected None"),
    (values(SETTINGS, similarity_fn_name="dot"), "similarity: found 'dot', expected 'cosine'"),
    (values(SETTINGS, truncate_dim=32), f"{SETTINGS}: truncate: found 32, expected None"),
    (
        values("sentence_bert_config.json", do_lower_case=True),
        "sentence_bert_config.json: lower_case: found True, expected False",
    ),
    (
        values("sentence_bert_config.json", max_seq_length=8),
        "sentence_bert_config.json or tokenizer_config.json: tokens of a text: found 8, expected 3",
    ),
    (
        values("tokenizer_config.json", model_max_length=8),
        "tokens of a text: found 8, expected 32,",
    ),
    (values("tokenizer_config.json", truncation_side="left"), "truncation_side: found 'left'"),
    (
        values("config.json", max_position_embeddings=65536),
        "max_position_embeddings: found 65536, ",
    ),
    (lambda folder: (folder / "modules.json").unlink(), "modules.json: it is missing"),
    (
        values("config.json", hidden_size=32),
        "config.json: word_embedding_dimension is 64, and only",
    ),
]
RERANKER: list[tuple[Change, str]] = [
    (
        values(
            "config.json",
            sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
        ),
        "config.json: activation: found 'identity', expected 'sigmoid'",
    ),
    (values("config.json", num_labels=2, id2label={"0": "n", "1": "y"}), "a Sigmoid for each of"),
    (other_template, "chat_template.jinja: pair 0 has other tokens in it than in embedport"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja: pair 0 has"),
    (of_a_language_model, "has no chat template (chat_template.jinja, or"),
]
QUANTIZED: list[tuple[str, Change, str]] = [
    ("embedding", values(POOLING, include_prompt=False), "include_prompt: found False, expected T"),
    (
        "embedding",
        values(SETTINGS, prompts={"query": "find: "}),
        "prompts: found {'query': 'find: ",
    ),
    (
        "embedding",
        values("quantize_config.json", bits=8),
        "quantize_config.json: it should be the ",
    ),
    ("reranker", other_template, "chat_template.jinja: pair 0 has other tokens"),
    ("reranker", without_template, "chat_template.jinja: pair 0 has other tokens"),
    ("reranker", without_instructions, "chat_template.jinja: a pair with its own instruction has"),
    (
        "reranker",
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "has no chat template (chat_template.jinja, or",
    ),
    (
        "reranker",
        values("config.json", architectures=["Qwen3Model"]),
        "config.json: architectures: found ['Qwen3Model'], expected ['Qwen3ForCausalLM'] as in",
    ),
    (
        "reranker",
        with_own_head,
        "config.json: tie_word_embeddings: found True, expected False as in the weights",
    ),
]


def skips_no_padding(folder: Path) -> None:
    """On the right, where transformers would have to."""
    values("tokenizer_config.json", padding_side="right")(folder)
    values("config.json", pad_token_id=None)(folder)


CLASSIFIER: list[tuple[Change, str]] = [
    (skips_no_padding, "config.json: pad_token_id: found None, expected 1019 as in tokenizer_con"),
    (other_template, "chat_template.jinja: pair 0 has other tokens"),
    (last_token_is_padding, "chat_template.jinja: pair 0 has other tokens"),
]
ADDED = [
    "onnx/model_fp16.onnx",
    "openvino/openvino_model.xml",
    "model-00001-of-00002.safetensors",
    "2_Dense/config.json",
    "generation_config.json",
]


def check(folder: Path, words: str) -> None:
    """A changed artifact has one difference, with these words."""
    gate = gate_of(folder)
    assert (gate.name, gate.value, gate.failed) == (GATE, 1, True)
    assert words in gate.detail


@pytest.mark.parametrize(("change", "words"), EMBEDDER)
def test_another_file_of_an_embedder(folders, changed, change, words):
    check(changed(folders("embedding").artifact, change), words)


@pytest.mark.parametrize(("change", "words"), RERANKER)
def test_another_file_of_a_reranker(folders, changed, change, words):
    check(changed(folders("reranker").artifact, change), words)


@pytest.mark.parametrize(("task", "change", "words"), QUANTIZED)
def test_another_file_of_a_quantized_checkpoint(quantized, changed, task, change, words):
    check(changed(quantized("gptq", task), change), words)


@pytest.mark.parametrize(("change", "words"), CLASSIFIER)
def test_another_file_of_a_quantized_classifier(quantized, changed, change, words):
    folder = quantized("gptq", "reranker", form="sequence-classification")
    check(changed(folder, change), words)


def test_sound_files(folders, quantized):
    sound = [
        folders("embedding").artifact,
        folders("embedding", consumers=("transformers.js",), precision="int8").artifact,
        folders("embedding", dim=32).artifact,
        folders("reranker").artifact,
        quantized("gptq"),
        quantized("gptq", "reranker"),
        quantized("gptq", "reranker", form="sequence-classification"),
    ]
    for folder in sound:
        gate = gate_of(folder)
        assert (gate.value, gate.detail) == (0, "")


def test_a_checkpoint_of_another_tool(checkpoints):
    """It has no manifest that its files could differ from."""
    assert files_gate(read_info(checkpoints()), {}, []) == []


@pytest.mark.parametrize("name", ADDED)
def test_an_added_file(folders, copied, name):
    """As of an older artifact that a new one was copied over: no manifest lists it."""
    folder = copied(folders("embedding").artifact)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    gate = gate_of(folder)
    assert (gate.value, gate.detail) == (1, f"{name}: it was added")


def test_a_file_that_nobody_opens(folders, copied):
    folder = copied(folders("embedding").artifact)
    for name in ("report.json", "report.html", "notes.txt", "vectors.npy", ".gitattributes"):
        (folder / name).write_text("{}")
    (folder / "parts").mkdir()
    assert gate_of(folder).value == 0


LAYERS: list[dict[str, Any]] = [
    {"rope_theta": 1000},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rms_norm_eps": 1e-3},
    {"head_dim": 32},
    {"is_causal": False},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"attention_bias": True},
]


@pytest.mark.parametrize("changes", LAYERS, ids=lambda changes: next(iter(changes)))
def test_other_layers_beside_a_graph(folders, changed, changes):
    """Nothing that embedport runs reads them there."""
    model = folders("embedding")
    settings = {"layers": layer_settings(ModelSpec.from_checkpoint(model.checkpoint))}
    assert gate_of(model.artifact, settings).value == 0
    gate = gate_of(changed(model.artifact, values("config.json", **changes)), settings)
    assert gate.failed
    assert "as in the reference" in gate.detail


def test_where_texts_are_cut(folders, changed):
    """Where the artifact cuts them, or at the reference's limit, as other software may."""
    folder = folders("embedding", max_length=64).artifact
    known = ({}, {"max_length": 32768}, {"max_length": 512})
    assert [gate_of(folder, settings).value for settings in known] == [0, 0, 0]

    def change(folder: Path) -> None:
        values("sentence_bert_config.json", max_seq_length=32768)(folder)
        values("tokenizer_config.json", model_max_length=131072)(folder)

    folder = changed(folder, change)
    assert [gate_of(folder, settings).value for settings in known] == [0, 0, 1]


def test_nothing_else_fails(folders, changed, checkpoints, tmp_path):
    """With a recorded reference, which knows where its library cuts a text."""
    recorded = tmp_path / "model.reference"
    embedport.record_reference(checkpoints("kv2"), recorded, ["tea"], device="cpu")
    assert (read_recorded(recorded).declared or {})["max_length"] == 32768

    def change(folder: Path) -> None:
        values("tokenizer_config.json", model_max_length=8)(folder)
        shutil.copy(folder / "onnx" / "model.onnx", folder / "onnx" / "model_q4.onnx")

    folder = changed(folders("embedding").artifact, change)
    (folder / "adapter_model.bin").touch()
    report = embedport.validate(folder, recorded, device="cpu", record=False)
    (gate,) = [gate for gate in report.gates if gate.failed]
    assert (gate.name, gate.value) == (GATE, 2)
    assert gate.detail.startswith("adapter_model.bin: it was added; sentence_bert_config.json or ")
    assert report.next_steps == (
        "Take files that were added out of the folder; if others changed, make it again.",
    )
