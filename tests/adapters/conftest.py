"""Small random bases, and adapters that PEFT saves for them."""

import json
from typing import Any

import numpy as np
import pytest

import embedport
from tests.synthetic import Geometry, write_checkpoint

GEOMETRY = Geometry(64, 3, 4, 2, 16, 128, tied=True)
TEXTS = [
    "What is the capital of China?",
    "The capital of China is Beijing.",
    "tea",
    "Gravity pulls two bodies towards each other; how strongly depends on their masses. " * 2,
]
PAIRS = [
    ("What is tea?", "Tea is a drink made of leaves."),
    ("What is tea?", "The capital of China is Beijing."),
    ("bread", "Bread is baked from flour and water, and eaten everywhere."),
]
CLASSES = {
    "bare": "AutoModel",
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
}
TYPES = {"bare": "FEATURE_EXTRACTION", "causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}


def open_base(folder, kind, **options):
    import transformers

    return getattr(transformers, CLASSES[kind]).from_pretrained(folder, **options)


def randomize(model, seed=0):
    """Give what was trained random values: PEFT's B is zero at first."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            size = 0.5 / parameter.shape[-1] ** 0.5
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def merged(base, kind, adapter, **options):
    """The base with the adapter as PEFT merges it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(open_base(base, kind, **options), str(adapter))
    return model.merge_and_unload().eval()


def vectors(model, prompt=None, **options):
    """Vectors of the texts, by an embedder on the CPU."""
    found = embedport.load(model, device="cpu", **options)
    assert isinstance(found, embedport.Embedder)
    return found.encode(TEXTS, prompt=prompt)


def scores(model, **options):
    """Scores of the pairs, by a reranker on the CPU."""
    found = embedport.load(model, device="cpu", **options)
    assert isinstance(found, embedport.Reranker)
    return found.score(PAIRS)


def passes(artifact, base, **options):
    """Whether validate passes, by the texts or pairs above."""
    inputs = {"texts": TEXTS} if artifact.manifest.task == "embedding" else {"pairs": PAIRS}
    common: dict[str, Any] = {"device": "cpu", "record": False, **inputs}
    return embedport.validate(artifact.folder, base, **common, **options).passed


def cosines(found, expected):
    found, expected = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (found, expected))
    return (found * expected).sum(-1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory, small_tokenizer):
    """A function (task, dtype, tied) -> a plain checkpoint, cached."""
    made = {}

    def make(task="embedding", dtype="float32", tied=True):
        key = (task, dtype, tied)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"base-{task}") / "base"
            geometry = GEOMETRY if tied else Geometry(64, 3, 4, 2, 16, 128, tied=False)
            made[key] = write_checkpoint(
                folder, geometry, task, small_tokenizer, dtype=dtype, seed=5
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """A function (base, kind, **options of LoraConfig) -> an adapter's folder, cached."""
    from peft import LoraConfig, get_peft_model

    made = {}

    def make(base, kind="bare", seed=0, labels=None, **options):
        key = (base, kind, seed, labels, json.dumps(options))
        if key not in made:
            further = {} if labels is None else {"num_labels": labels}
            usual: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
            usual |= {"r": 4, "lora_alpha": 16, "task_type": TYPES[kind], **options}
            config = LoraConfig(**usual)
            model = get_peft_model(open_base(base, kind, **further), config)
            randomize(model, seed)
            folder = tmp_path_factory.mktemp("adapter") / "adapter"
            model.save_pretrained(str(folder))
            made[key] = folder
        return made[key]

    return make


def save_with_adapter(model, folder, **options):
    """Give a model of sentence-transformers an adapter, and save it as that library does."""
    from peft import LoraConfig

    targets = ["k_proj", "down_proj"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options))
    randomize(model)
    model.save_pretrained(str(folder))
    return folder
