"""Descendants: small random checkpoints whose files declare other pipelines than the originals'."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.processors import ByteLevel, TemplateProcessing

import embedport
from tests.synthetic import Geometry, write_checkpoint

GEOMETRY = Geometry(64, 3, 4, 2, 16, 160, tied=True)
TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
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


def edit(path, **changes):
    """Change keys of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values.update(changes)
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def template(tokenizer, end):
    """A tokenizer whose every text ends with a token, or with none."""
    if end is None:
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
    else:
        ids = [(end, tokenizer.token_to_id(end))]
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=ids
        )


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


def change_tensors(folder, change):
    """Replace the weights by what `change` makes of them; the base's file stays."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
