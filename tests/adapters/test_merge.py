"""Merged weights and their results, against PeftModel.merge_and_unload()."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint import lora
from embedport.checkpoint.lora import AdaptedWeights
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError

from .conftest import PAIRS, TEXTS, cosines, merged, open_base, scores, vectors

# PEFT's, of what it saves and of what transformers will call otherwise.
pytestmark = pytest.mark.filterwarnings("ignore")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What PEFT is asked for, of a bare Qwen3Model.
CONFIGS = {
    "plain": {},
    "ranks": {"r": 8, "lora_alpha": 3, "target_modules": ALL},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^layers.2.*v_proj": 8},
        "alpha_pattern": {"v_proj": 5, "q_proj": 7},
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.[12]+\..*(gate|up)_pro.*|layers\.0\.mlp\.up"},
    "excluded": {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
    "excluded by regex": {"target_modules": ALL, "exclude_modules": r".*mlp\..*"},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "a layer": {"layers_to_transform": 1, "layers_pattern": ["layers"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "norms": {"modules_to_save": ["norm", "1.mlp.up_proj"]},
    "eva": {"init_lora_weights": "eva"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Matrices are merged in several blocks of rows, as large ones are."""
    monkeypatch.setattr(lora, "BLOCK_ROWS", 24)


def check_tensors(spec, model):
    """Every tensor, and a few of its rows, are those of a merged model."""
    weights = AdaptedWeights(spec)
    expected = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    changed = 0
    for name in spec.tensor_shapes():
        found, wanted = weights.read_fp32(name), expected[name].float().numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(weights.read_fp32(name, slice(3, 9)), found[3:9])
        changed += name in spec.plan_merge().added or name in spec.plan_merge().replaced
    return changed


@pytest.mark.parametrize(
    "config",
    [
        # Their like are fast: plain, a layer, excluded.
        pytest.param(
            config,
            id=name,
            marks=[pytest.mark.slow] if name in ("ranks", "layers", "excluded by regex") else [],
        )
        for name, config in CONFIGS.items()
    ],
)
def test_tensors(bases, adapters, config):
    adapter = adapters(bases(), **config)
    spec = ModelSpec.from_checkpoint(bases(), adapter=adapter)
    assert check_tensors(spec, merged(bases(), "bare", adapter))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bases_in_16_bits_are_merged_in_fp32(bases, adapters, dtype):
    base = bases(dtype=dtype)
    adapter = adapters(base)
    spec = ModelSpec.from_checkpoint(base, adapter=adapter)
    assert check_tensors(spec, merged(base, "bare", adapter, dtype=torch.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_a_rerankers_own_head(bases, adapters, tied):
    base = bases("reranker", tied=tied)
    adapter = adapters(base, "causal", modules_to_save=["lm_head"], target_modules="all-linear")
    spec = ModelSpec.from_checkpoint(base, adapter=adapter)
    assert not spec.tied
    assert check_tensors(spec, merged(base, "causal", adapter)) == 22


@pytest.mark.parametrize(("layers", "changed"), [(None, 5), (1, 2)])
def test_lora_on_an_untied_head(bases, adapters, layers, changed):
    """A module named in full has its pair whatever the layers are."""
    base = bases("reranker", tied=False)
    targets = ["lm_head", "embed_tokens", "q_proj"]
    adapter = adapters(base, "causal", target_modules=targets, layers_to_transform=layers)
    spec = ModelSpec.from_checkpoint(base, adapter=adapter)
    assert check_tensors(spec, merged(base, "causal", adapter)) == changed


def peft_vectors(base, kind, adapter, texts):
    """Vectors of the merged model in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(base), device="cpu")
    whole = merged(base, kind, adapter)
    model[0].model = whole if kind == "bare" else whole.model
    return model.encode(texts)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bare", CONFIGS["patterns"]),
        # A bare embedder's adapter, trained in a class with a head.
        ("causal", {"target_modules": r"^model\.layers.*_proj", "use_rslora": True}),
        ("causal", {"modules_to_save": ["lm_head"]}),  # which an embedder does not have
    ],
)
def test_embedder(bases, adapters, tmp_path, kind, config):
    adapter = adapters(bases(), kind, **config)
    expected = peft_vectors(bases(), kind, adapter, TEXTS)
    artifact = embedport.export(bases(), tmp_path / "onnx", adapter=adapter)
    for found in (vectors(bases(), adapter=adapter), vectors(artifact.folder)):
        assert cosines(found, expected).min() >= 0.999999
    assert cosines(vectors(bases()), expected).min() < 0.99


def peft_scores(base, adapter, pairs):
    """Probabilities of the merged model by the model card's code, in transformers."""
    from embedport.checkpoint.hub import fetch
    from embedport.checkpoint.spec import read_spec
    from embedport.texts.samples import Pair
    from embedport.validation.card import CardReference

    reference = CardReference(read_spec(fetch(base)), None, "cpu")
    model = merged(base, "causal", adapter)
    inputs = [Pair(*pair) for pair in pairs]
    with torch.inference_mode():
        return reference.answer(model, inputs, reference.token_ids(inputs))


def test_reranker(bases, adapters, tmp_path):
    base = bases("reranker")
    adapter = adapters(base, "causal", modules_to_save=["lm_head"], target_modules="all-linear")
    expected = peft_scores(base, adapter, PAIRS)
    artifact = embedport.export(base, tmp_path / "onnx", adapter=adapter)
    for found in (scores(base, adapter=adapter), scores(artifact.folder)):
        assert np.abs(found - expected).max() < 1e-5
    assert np.ptp(expected) > 1e-3


def test_what_peft_misses_or_refuses(bases, adapters, tmp_path):
    """It only warns of a tensor that is missing, and leaves that module as it was."""
    from embedport.validation.adapted import merge_adapter

    folder = Path(shutil.copytree(adapters(bases()), tmp_path / "adapter"))
    adapter = ModelSpec.from_checkpoint(bases(), adapter=folder).adapter
    assert adapter is not None
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="PEFT says: Found missing adapter keys"):
        merge_adapter(open_base(bases(), "bare"), adapter)
    path.unlink()
    with pytest.raises(CheckpointError, match="PEFT cannot merge it: "):
        merge_adapter(open_base(bases(), "bare"), adapter)


@pytest.mark.parametrize("labels", [1, 2])
def test_classifier(bases, adapters, tmp_path, labels):
    """A base without a classifier's head gets the adapter's; CrossEncoder opens what it makes."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer

    base = bases("reranker")
    adapter = adapters(base, "classifier", labels=labels, target_modules="all-linear")
    merged(base, "classifier", adapter, num_labels=labels).save_pretrained(tmp_path / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "merged")
    encoder = CrossEncoder(str(tmp_path / "merged"), device="cpu")
    expected = encoder.predict(PAIRS, batch_size=1)  # it knows no padding token
    if labels == 2:  # the probability of the second
        expected = 1 / (1 + np.exp(expected[:, 0] - expected[:, 1]))
    assert np.abs(scores(base, adapter=adapter) - expected).max() < 1e-5
