"""Settings that no validated text shows: an artifact that declares others fails."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import embedport
from embedport.runtimes import read_info
from embedport.texts.samples import Sample
from embedport.validation.companions import GATE as FILES
from embedport.validation.opening import open_live
from embedport.validation.settings import GATE, settings_gate

TEXTS = [Sample("What is tea?", "query"), Sample("A leaf from China."), Sample("Snow is cold.")]
DECLARED = {"sts": "Compare: ", "empty": ""}


@pytest.fixture(scope="module")
def declared(checkpoints, tmp_path_factory):
    """(a checkpoint with more prompts and a similarity of its own, its artifact)."""
    base = tmp_path_factory.mktemp("declared")
    folder = Path(shutil.copytree(checkpoints("kv2"), base / "checkpoint"))
    path = folder / "config_sentence_transformers.json"
    values = json.loads(path.read_text())
    values |= {"prompts": values["prompts"] | DECLARED, "similarity_fn_name": "dot"}
    path.write_text(json.dumps(values))
    embedport.export(folder, base / "artifact")
    return folder, base / "artifact"


def edit_manifest(folder, part, **values):
    """Change the inputs or outputs in an artifact's manifest."""
    path = folder / "embedport.json"
    manifest = json.loads(path.read_text())
    for key, value in values.items():
        whole = manifest[part] if part else manifest
        whole[key] = whole[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(manifest))


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("inputs", {"prompts": {"sts": "other"}}, "prompt 'sts': found 'other', expected 'Compare: '"),
    ("inputs", {"prompts": {"new": "x: "}}, "prompt 'new': found 'x: ', expected none"),
    ("inputs", {"default_prompt": "sts"}, "default prompt: found 'sts', expected none"),
    ("outputs", {"similarity": "cosine"}, "similarity: found 'cosine', expected 'dot'"),
    ("outputs", {"truncate": 64}, "truncate dim: found 64, expected none"),
    ("", {"max_position_embeddings": 65536}, "positions: found 65,536, expected at most 32,768"),
]


@pytest.mark.parametrize(("part", "values", "detail"), CHANGES, ids=lambda value: str(value)[:30])
def test_another_setting(declared, copied, part, values, detail):
    checkpoint, artifact = declared
    folder = copied(artifact)
    settings = open_live(checkpoint, task="embedding", device="cpu").settings()
    assert settings_gate(read_info(folder), settings).value == 0
    edit_manifest(folder, part, **values)
    gate = settings_gate(read_info(folder), settings)
    assert (gate.value, gate.failed, gate.detail) == (1, True, detail)


def test_a_missing_prompt_fails(declared, copied, tmp_path):
    """With the checkpoint and with a recorded reference; the record does not quote it."""
    checkpoint, artifact = declared
    folder, recorded = copied(artifact), tmp_path / "model.reference"
    embedport.record_reference(checkpoint, recorded, TEXTS, device="cpu")
    path = folder / "embedport.json"
    manifest = json.loads(path.read_text())
    del manifest["inputs"]["prompts"]["sts"]
    path.write_text(json.dumps(manifest))
    for reference, texts in ((checkpoint, TEXTS), (recorded, None)):
        report = embedport.validate(folder, reference, texts, device="cpu")
        gate, files = [gate for gate in report.gates if gate.failed]
        assert (gate.name, files.name) == (GATE, FILES)
        assert report.next_steps[0].startswith("Compare both folders' settings")
        assert files.detail.startswith("config_sentence_transformers.json: prompts: found {")
        assert gate.detail == "prompt 'sts': found none, expected 'Compare: '"
        assert "Compare: " not in json.dumps(report.to_record())


def test_options_of_an_export_are_no_differences(declared, tmp_path):
    checkpoint, _ = declared
    embedport.export(checkpoint, tmp_path / "small", dim=32, max_length=48)
    settings = open_live(checkpoint, task="embedding", device="cpu", max_length=48).settings()
    assert settings_gate(read_info(tmp_path / "small"), settings).value == 0


def test_prompts_of_a_reranker(folders):
    info = read_info(folders("reranker").artifact)
    settings = {"positions": 32768, "prompts": {"own": "Find the law"}, "default_prompt": "own"}
    gate = settings_gate(info, settings)
    assert gate.detail == (
        "prompt 'own': found none, expected 'Find the law'; default prompt: found none, "
        "expected 'own'"
    )
    inputs = replace(info.inputs, prompts={"own": "Find the law"}, default_prompt="own")
    assert settings_gate(replace(info, inputs=inputs), settings).value == 0
