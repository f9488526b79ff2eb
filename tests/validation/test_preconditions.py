"""Everything that a validation refuses or warns about before it runs anything."""

import json
import shutil
from pathlib import Path

import pytest

import embedport
from embedport.errors import InputError
from embedport.texts.samples import Pair, Sample

TEXTS = [Sample("Explain gravity", "query"), Sample("a document", "document")]
PAIRS = [Pair("Explain gravity", "a document")]


def validate(folders, **options):
    return embedport.validate(folders.artifact, folders.checkpoint, device="cpu", **options)


@pytest.mark.parametrize(
    ("task", "inputs", "limit", "message"),
    [
        ("embedding", {"texts": ["a", "b"]}, "max_score_difference", "found documents only"),
        ("embedding", {"texts": TEXTS[:1]}, "max_score_difference", "found queries only"),
        ("embedding", {}, "max_ndcg_loss", "`max_ndcg_loss` .* give `retrieval` or `mteb` too"),
        ("reranker", {}, "max_ndcg_loss", "`max_ndcg_loss` .* give `retrieval` or `mteb` too"),
        ("reranker", {}, "min_cosine", "a reranker gives scores, not vectors"),
    ],
)
def test_a_limit_that_no_gate_would_hold(folders, task, inputs, limit, message):
    with pytest.raises(InputError, match=message):
        validate(folders(task), **inputs, **{limit: 0.5})


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("min_cosine", (1.5, 0, -1, float("nan"), float("inf"), "1", True)),
        ("max_score_difference", (-1e-3, float("nan"), float("inf"), "1")),
        ("max_ndcg_loss", (-0.1, 1.5, float("nan"), "1")),
    ],
)
def test_a_limit_out_of_range(name, limits):
    """It is known before anything is opened: every gate would hold, or none."""
    for limit in limits:
        with pytest.raises(InputError, match=f"{name} should be .*, found {limit!r}"):
            embedport.validate("nowhere", "nowhere", **{name: limit})


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("embedding", {"pairs": PAIRS}, "embedding model: give texts, not pairs"),
        ("reranker", {"texts": TEXTS}, "reranker: give pairs, not texts"),
        ("embedding", {"texts": []}, r"at least one text or pair, found \[\]"),
        ("reranker", {"pairs": []}, r"at least one text or pair, found \[\]"),
        ("embedding", {"texts": "one string"}, "texts should be a list, found one string"),
        ("embedding", {"texts": {"id": "a text"}}, "texts should be a list, found dict"),
        ("reranker", {"pairs": ["ab"]}, r"a pair should be \(query, document\), found 'ab'"),
        ("reranker", {"pairs": [{"query": "a", "document": "b"}]}, "a pair should be"),
        ("embedding", {"texts": ["bad \ud800"]}, "lone surrogate"),
        ("embedding", {"texts": [Sample("x", "qurey")]}, "no prompt is named 'qurey'"),
    ],
)
def test_wrong_inputs(folders, task, options, message):
    with pytest.raises(InputError, match=message):
        validate(folders(task), **options)


def test_another_models_checkpoint(folders, checkpoints):
    with pytest.raises(
        InputError, match=r"the artifact was made from .*\(64, \d+\); the reference"
    ):
        embedport.validate(folders("embedding").artifact, checkpoints("kv1"), device="cpu")


def test_a_checkpoint_with_shorter_vectors(folders, tmp_path):
    made = folders("embedding")
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "shorter"))
    path = checkpoint / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 24}))
    with pytest.raises(InputError, match="vectors have 64 values and the reference's 24"):
        embedport.validate(made.artifact, checkpoint, ["a"], device="cpu", record=False)


def test_other_weights_than_it_was_made_of(folders, checkpoints, caplog):
    """The geometry is the same: only the hashes tell."""
    artifact = folders("embedding").artifact
    for options, warned in (({}, False), ({"dtype": "float32"}, True)):
        embedport.validate(
            artifact, checkpoints("kv2", **options), ["a"], device="cpu", record=False
        )
        assert ("model.safetensors has the sha256" in caplog.text) == warned
