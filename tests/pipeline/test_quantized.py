"""Quantized descendants, opened by the checkpoints' own libraries."""

import json
from dataclasses import replace

import numpy as np
import pytest

import embedport
from embedport.artifact.folder import write_manifest
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import InputError
from embedport.runtimes import read_info
from embedport.validation.companions import files_gate
from tests.synthetic import edit

from .conftest import PAIRS, ROLES, TEXTS, change_tensors, open_embedder, open_reranker

DENSE = {
    "in_features": 64,
    "out_features": 32,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


def test_modules_are_carried_over(with_modules, tmp_path):
    from sentence_transformers import SentenceTransformer

    pooling = {"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": False}
    folder = with_modules(
        ("Pooling", pooling), ("Dense", DENSE), prompts={"own": "Say: "}, default="own"
    )
    edit(folder / "config.json", is_causal=False)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    artifact = embedport.quantize_checkpoint(folder, tmp_path / "w8a8", method="w8a8", fast=True)
    assert artifact.manifest.embedding_dim == 32
    found = open_embedder(artifact.folder).encode(TEXTS)
    theirs = SentenceTransformer(str(artifact.folder), device="cpu").encode(TEXTS)
    for each in (found, theirs):
        cosines = (each * expected).sum(axis=1) / np.linalg.norm(each, axis=1)
        assert (cosines / np.linalg.norm(expected, axis=1)).min() > 0.98


@pytest.mark.parametrize(
    ("form", "no"),
    [("causal-lm", "Ġof"), ("sequence-classification", "Ġof"), ("causal-lm", None)],
)
def test_a_reranker_in_both_forms(with_score, tmp_path, form, no):
    from sentence_transformers import CrossEncoder

    settings = {"prompts": {"own": "Find a drink."}, "default_prompt_name": "own"}
    folder = with_score("Ġthe", no, **settings)
    expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    artifact = embedport.quantize_checkpoint(folder, tmp_path / "fp8", method="fp8", form=form)
    found = open_reranker(artifact.folder).score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=0.05)
    theirs = CrossEncoder(str(artifact.folder), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(theirs, expected, atol=0.05)
    config = json.loads((artifact.folder / "config.json").read_text())
    # vLLM subtracts two tokens' logits.
    assert ("classifier_from_token" in config) == (form == "causal-lm" and no is not None)
    if "classifier_from_token" in config:
        for tokens, count in ((["Ġof", "Ġthe"], 0), (["Ġthe", "Ġof"], 1), ([7, 8], 1)):
            edit(artifact.folder / "config.json", classifier_from_token=tokens)
            write_manifest(artifact.folder, artifact.manifest, "fp8")
            (gate,) = files_gate(read_info(artifact.folder), {}, [])
            assert gate.value == gate.detail.count("config.json: classifier_from_token:") == count


def test_a_classifier_stays_one(classifier, tmp_path):
    """Two labels become one row: their scores' difference."""
    from sentence_transformers import CrossEncoder

    folder = classifier(2, ROLES)

    def soften(tensors):
        tensors["score.weight"] /= 8

    change_tensors(folder, soften)
    expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS, apply_softmax=True)[:, 1]
    with pytest.raises(InputError, match="is a classifier and has no head for words"):
        embedport.quantize_checkpoint(folder, tmp_path / "q", method="fp8", form="causal-lm")
    artifact = embedport.quantize_checkpoint(folder, tmp_path / "q", method="w8a8", fast=True)
    found = open_reranker(artifact.folder).score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=0.05)
    theirs = CrossEncoder(str(artifact.folder), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(theirs, expected, atol=0.05)


def test_a_pair_of_texts_has_no_classifier(with_score, tmp_path):
    folder = with_score(first={"transformer_task": "text-generation"}, chat=None)
    with pytest.raises(InputError, match="joins pairs in its tokenizer"):
        embedport.quantize_checkpoint(
            folder, tmp_path / "q", method="fp8", form="sequence-classification"
        )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_theta": 7000.0},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ],
)
def test_the_rotary_embedding_is_read_alike_by_transformers_4_and_5(descend, tmp_path, rope):
    folder = descend()
    edit(folder / "config.json", rope_theta=None, rope_scaling=None)
    edit(folder / "config.json", **rope)
    spec = ModelSpec.from_checkpoint(folder)
    artifact = embedport.quantize_checkpoint(folder, tmp_path / "fp8", method="fp8")
    written = ModelSpec.from_checkpoint(artifact.folder, task="embedding")
    assert replace(written.rope, original=0) == replace(spec.rope, original=0)
    config = json.loads((artifact.folder / "config.json").read_text())
    # What 4.57 reads.
    assert config["rope_theta"] == 5000.0
    kind = rope["rope_parameters"]["rope_type"]
    if kind == "yarn":
        assert (config["rope_scaling"]["rope_type"], config["rope_scaling"]["factor"]) == (kind, 4)
        assert "rope_theta" not in config["rope_scaling"]
    else:
        assert "rope_scaling" not in config
