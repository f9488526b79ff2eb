"""A reference that sentence-transformers runs: as users call it, and against the card's code."""

import json
from typing import Any

import numpy as np
import pytest
import sentence_transformers
from torch.nn import Identity

from embedport.errors import CheckpointError
from embedport.exporters.classifier import pair_template
from embedport.texts.prompts import query_prompt
from embedport.texts.samples import Pair, Sample, builtin_pairs, builtin_samples
from embedport.validation.card import CardReference
from embedport.validation.opening import open_live
from embedport.validation.tasks import RerankerTask

SAMPLES = [
    *(sample for sample in builtin_samples() if len(sample.text) < 200),
    Sample("", "query"),
    Sample("tea", "find: "),
    Sample("tea", query_prompt("Find the statute")),
]
PAIRS = [pair for pair in builtin_pairs() if len(pair.document) < 200][:6]


@pytest.fixture
def cross_encoder(checkpoints, copied, tmp_path):
    """A function (**options of CrossEncoder) -> a reranker's folder as the library saves it."""

    def make(**options):
        folder = copied(checkpoints("kv2", "reranker"))
        (folder / "chat_template.jinja").write_text(pair_template())
        model = sentence_transformers.CrossEncoder(str(folder), device="cpu", **options)
        saved = tmp_path / "saved"
        model.save_pretrained(str(saved), create_model_card=False)
        return saved

    return make


def open_both(folder, task):
    found = open_live(folder, task=task, max_length=512, device="cpu")
    assert found.origin.library == "sentence-transformers"
    assert found.origin.runner == f"sentence-transformers {sentence_transformers.__version__}"
    return found, CardReference(found.spec, 512, "cpu")


def test_an_embedder_in_both_libraries(checkpoints):
    """The originals have both forms, and both give the same."""
    library, card = open_both(checkpoints("kv2"), "embedding")
    assert library.token_ids(SAMPLES) == card.token_ids(SAMPLES)
    found, expected = (each.run(SAMPLES, "fp32") for each in (library, card))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("log_odds", [False, True])
def test_a_reranker_in_both_libraries(cross_encoder, log_odds):
    """Scores are compared as probabilities, whichever of the two the library gives."""
    folder = cross_encoder(**({"activation_fn": Identity()} if log_odds else {}))
    library, card = open_both(folder, "reranker")
    assert library.origin.log_odds is log_odds
    assert library.token_ids(PAIRS) == card.token_ids(PAIRS)
    found, expected = (each.run(PAIRS, "fp32") for each in (library, card))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    model = sentence_transformers.CrossEncoder(
        str(folder), device="cpu", model_kwargs={"dtype": "float32"}
    )
    given: Any = [(pair.query, pair.document) for pair in PAIRS]
    scores = np.asarray(model.predict(given))
    comparable = RerankerTask(PAIRS, log_odds=log_odds).comparable(scores)
    np.testing.assert_allclose(comparable, expected, atol=1e-3)  # of weights in bf16, not fp16


def test_a_pair_may_have_its_own_instruction(cross_encoder):
    library, card = open_both(cross_encoder(), "reranker")
    pairs = [*PAIRS[:2], Pair(PAIRS[0].query, PAIRS[0].document, "Find the statute")]
    assert library.token_ids(pairs) == card.token_ids(pairs)
    found, expected = (each.run(pairs, "fp32") for each in (library, card))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found[2] - found[0]) > 1e-4


def test_it_is_called_as_users_call_it(checkpoints, copied):
    """encode_query, encode_document, and encode with a prompt or its name."""
    folder = copied(checkpoints("kv2", dtype="float32"))
    prompts = {"query": "ask: ", "document": "is: ", "title": "named: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    reference = open_live(folder, task="embedding", max_length=512, device="cpu")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    expected = {
        Sample("tea", "query"): model.encode_query("tea"),
        Sample("tea", "document"): model.encode_document("tea"),
        Sample("tea", ""): model.encode("tea"),
        Sample("tea", "title"): model.encode("tea", prompt_name="title"),
        Sample("tea", "seen as: "): model.encode("tea", prompt="seen as: "),
    }
    np.testing.assert_allclose(
        reference.run(list(expected), "fp32"), np.stack([*expected.values()]), atol=1e-6
    )
    fed = reference.token_ids([Sample("tea", "title"), Sample("tea", "query")])
    assert fed == [model.tokenizer(text)["input_ids"] for text in ("named: tea", "ask: tea")]


def test_long_inputs_are_cut_where_asked(checkpoints):
    folder = checkpoints("kv2")
    samples = [Sample("long " * 99), Sample("short")]
    reference = open_live(folder, task="embedding", max_length=33, device="cpu")
    assert [len(ids) > 32 for ids in reference.token_ids(samples)] == [True, False]
    assert max(map(len, reference.token_ids(samples))) == reference.limit == 33
    assert open_live(folder, task="embedding").limit == 32768


def refuse(*_, **__):
    raise ValueError("no")


def test_what_the_library_does_not_open_is_said(checkpoints, monkeypatch):
    """A folder that embedport takes, and the library does not."""
    folder = checkpoints("kv2")
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", refuse)
    with pytest.raises(CheckpointError, match=r"sentence-transformers cannot open it: ValueError"):
        open_live(folder, task="embedding").token_ids([Sample("tea")])


def test_what_it_cannot_tokenize_is_said(cross_encoder, monkeypatch):
    folder = cross_encoder()
    monkeypatch.setattr(sentence_transformers.CrossEncoder, "predict", refuse)
    with pytest.raises(CheckpointError, match=r"cannot tokenize these inputs: ValueError"):
        open_live(folder, task="reranker").token_ids([Pair("tea", "a leaf")])
