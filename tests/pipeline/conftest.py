"""Descendants: small random checkpoints whose files declare other pipelines than the originals'."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing

import embedport
from tests.synthetic import Geometry, edit, write_checkpoint

GEOMETRY = Geometry(64, 3, 4, 2, 16, 160, tied=True)
TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "text-generation": ("logits", "causal_logits"),
    "sequence-classification": ("logits", "scores"),
}
# A chat template of a pair's two roles.
ROLES = (
    "<|im_start|>system\n{{ messages | selectattr('role', 'eq', 'system')"
    " | map(attribute='content') | first | default('Judge.', true) }}"
    "<|im_end|>\n<|im_start|>user\nQ: "
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\nD: "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = [
    "What is the capital of China?",
    "The capital of China is Beijing.",
    "tea",
    "Gravity pulls two bodies towards each other; how strongly depends on their masses. " * 3,
    "Über ÄPFEL und Birnen, 12345!",
]
PAIRS = [
    ("What is tea?", "Tea is a drink made of leaves."),
    ("What is tea?", "The capital of China is Beijing."),
    ("bread", "Bread is baked from flour and water, and eaten everywhere. " * 4),
]


def write_json(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def end_texts_with(folder, end):
    """Make the tokenizer end every text with a token, or with none."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if end is None:
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
    else:
        ids = [(end, tokenizer.token_to_id(end))]
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=ids
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def messages(task, style=None):
    """A sentence_bert_config.json: texts, and in a style of theirs messages."""
    method_output, output = OUTPUTS[task]
    how = {"method": "forward", "method_output_name": method_output}
    modalities = (
        {"text": how} if style is None else {"text": how, "message": {**how, "format": style}}
    )
    return {
        "transformer_task": task,
        "modality_config": modalities,
        "module_output_name": output,
    }


@pytest.fixture(scope="session")
def bases(tmp_path_factory, small_tokenizer):
    """A function (task) -> a plain checkpoint in fp32, cached."""
    made = {}

    def make(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(f"base-{task}") / "checkpoint"
            made[task] = write_checkpoint(
                folder, GEOMETRY, task, small_tokenizer, dtype="float32", seed=3
            )
            # Random weights this small leave attention almost uniform: make it matter.
            tensors = load_file(folder / "model.safetensors")
            for name in tensors:
                if "_proj" in name:
                    tensors[name] = 8 * tensors[name]
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return made[task]

    return make


@pytest.fixture
def descend(tmp_path, bases):
    """A function (task, name) -> a copy of a plain checkpoint that a test may change."""

    def make(task="embedding", name="model"):
        source, folder = bases(task), tmp_path / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        os.link(source / "model.safetensors", folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def with_score(descend, small_tokenizer):
    """A function that makes a CrossEncoder of a LogitScore."""

    def make(yes="yes", no="no", first=None, chat=ROLES, **settings):
        folder = descend("reranker")
        answers = {"true_token_id": small_tokenizer.token_to_id(yes)}
        if no is not None:
            answers["false_token_id"] = small_tokenizer.token_to_id(no)
        write_modules(folder, [("LogitScore", answers)])
        first = messages("text-generation", "flat") if first is None else first
        write_json(folder / "sentence_bert_config.json", first)
        write_json(
            folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder", **settings}
        )
        if chat is not None:
            (folder / "chat_template.jinja").write_text(chat)
        return folder

    return make


@pytest.fixture
def classifier(descend):
    """A function that makes a sequence classifier of so many labels."""

    def make(labels=1, chat=None, **config):
        folder = descend("reranker")
        generator = np.random.default_rng(11)

        def add_head(tensors):
            tensors["score.weight"] = generator.standard_normal((labels, 64)).astype(np.float32)

        change_tensors(folder, add_head)
        edit(
            folder / "config.json",
            architectures=["Qwen3ForSequenceClassification"],
            id2label={str(i): str(i) for i in range(labels)},
            pad_token_id=config.pop("pad_token_id", 1021),
            **config,
        )
        if chat is not None:
            (folder / "chat_template.jinja").write_text(chat)
        return folder

    return make


@pytest.fixture
def with_modules(descend):
    """A function that makes an embedder of modules: (name, config) each behind the Transformer."""

    def make(*modules, prompts=None, default=None, settings=None, first=None, name="model"):
        folder = descend("embedding", name)
        shutil.rmtree(folder / "1_Pooling")
        write_modules(folder, modules)
        write_json(
            folder / "config_sentence_transformers.json",
            {
                "model_type": "SentenceTransformer",
                "prompts": {} if prompts is None else prompts,
                "default_prompt_name": default,
                **(settings or {}),
            },
        )
        if first is not None:
            write_json(folder / "sentence_bert_config.json", first)
        return folder

    return make


def write_modules(folder, modules):
    entries = [{"idx": 0, "name": "0", "path": "", "type": TYPES["Transformer"]}]
    for i, (name, config) in enumerate(modules, 1):
        place = f"{i}_{name}"
        entries.append({"idx": i, "name": str(i), "path": place, "type": TYPES[name]})
        if config or name != "Normalize":
            write_json(folder / place / "config.json", config)
        if name == "Dense":
            write_dense(folder / place, config)
    write_json(folder / "modules.json", entries)


def write_dense(folder, config):
    generator = np.random.default_rng(7)
    rows, columns = config["out_features"], config["in_features"]
    tensors = {"linear.weight": generator.standard_normal((rows, columns)) / columns**0.5}
    if config.get("bias", True):
        tensors["linear.bias"] = generator.standard_normal(rows) / 2
    if config.get("use_residual") and rows != columns:
        tensors["residual.weight"] = generator.standard_normal((rows, columns)) / columns**0.5
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def open_embedder(folder, **options):
    found = embedport.load(folder, device="cpu", **options)
    assert isinstance(found, embedport.Embedder)
    return found


def open_reranker(folder, **options):
    found = embedport.load(folder, device="cpu", **options)
    assert isinstance(found, embedport.Reranker)
    return found


def add_biases(folder, seed):
    """Give the four projections of attention random biases, and declare them."""
    generator = np.random.default_rng(seed)

    def change(tensors):
        for name in [name for name in tensors if "self_attn" in name and "proj" in name]:
            bias = generator.standard_normal(len(tensors[name])).astype(np.float32)
            tensors[name.replace("weight", "bias")] = bias

    change_tensors(folder, change)
    edit(folder / "config.json", attention_bias=True)


def change_tensors(folder, change):
    """Replace the weights by what `change` makes of them; the base's file stays."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


# Modules and settings that many folders have.
LAST = ("Pooling", {"embedding_dimension": 64, "pooling_mode": "lasttoken"})
UNIT = ("Normalize", {})
MESSAGES = messages("feature-extraction", "flat")
TANH = "torch.nn.modules.activation.Tanh"
