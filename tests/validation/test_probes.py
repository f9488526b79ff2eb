"""Texts beside the inputs: a tokenizer that is wrong on none of them but there is noticed."""

from typing import Any

import embedport
from embedport.errors import CheckpointError, InputError
from embedport.texts.samples import Sample
from embedport.validation.library import LibraryReference

PROBES = True
TOKENS = "inputs with other token ids"
SAMPLES = [Sample("What is tea?", "query"), Sample("Tea is a drink.")]
PAIRS = [("What is tea?", "Tea is a drink."), ("What is tea?", "Bread is baked.")]


def token_gate(report):
    (found,) = [gate for gate in report.gates if gate.name == TOKENS]
    return found


def check(folders, task):
    given: Any = {"texts": SAMPLES} if task == "embedding" else {"pairs": PAIRS}
    made = folders(task)
    return embedport.validate(made.artifact, made.checkpoint, device="cpu", record=False, **given)


def test_a_wrong_tokenizer(folders, spoil, wrong_tokenizer):
    task, change = wrong_tokenizer
    spoil(lambda runtime: change(runtime.tokenizer.tokenizer))
    report = check(folders, task)
    assert not report.passed
    assert token_gate(report).failed
    assert token_gate(report).detail.startswith("beside the inputs: ")


def test_another_length_is_said(folders, caplog, tmp_path):
    made = folders("embedding")
    embedport.export(made.checkpoint, tmp_path / "short", max_length=48)
    report = embedport.validate(
        tmp_path / "short", made.checkpoint, device="cpu", record=False, texts=SAMPLES
    )
    assert report.passed
    assert "short cuts inputs at 48 tokens, and sentence-transformers" in caplog.text
    caplog.clear()
    assert check(folders, "embedding").passed
    assert "cuts inputs" not in caplog.text


def test_a_text_that_an_artifact_refuses_is_left_out(folders, spoil):
    """As a classifier refuses texts that end with its padding token."""

    def refuse(runtime):
        encode = runtime.tokenizer.encode

        def refusing(texts, *arguments):
            if any("camelCase" in str(text) for text in texts):
                raise InputError("it is refused")
            return encode(texts, *arguments)

        runtime.tokenizer.encode = refusing

    spoil(refuse)
    report = check(folders, "reranker")
    assert report.passed
    assert token_gate(report).value == 0


def test_a_text_that_a_library_refuses_is_not_recorded(checkpoints, tmp_path, monkeypatch):
    token_ids = LibraryReference.token_ids

    def refusing(self, inputs):
        if any("camelCase" in given.text for given in inputs):
            raise CheckpointError("it is refused")
        return token_ids(self, inputs)

    monkeypatch.setattr(LibraryReference, "token_ids", refusing)
    file = tmp_path / "model.reference"
    found = embedport.record_reference(checkpoints("kv2"), file, SAMPLES, device="cpu").probes
    assert found is not None
    assert len(found.inputs) == len(found.rows) > 10
    assert not any("camelCase" in repr(given) for given in found.inputs)
