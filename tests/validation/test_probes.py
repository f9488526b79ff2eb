"""Texts beside the inputs: a tokenizer that is wrong on none of them but there is noticed."""

from typing import Any

import embedport
from embedport.texts.samples import Sample

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
