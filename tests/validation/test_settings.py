"""Settings that no validated text shows: an artifact that declares others fails."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import embedport
from embedport.runtimes import read_info
from embedport.texts.prompts import EmbeddingTokenizer
from embedport.texts.samples import Sample
from embedport.validation.companions import GATE as FILES
from embedport.validation.opening import open_live
from embedport.validation.settings import GATE, settings_gate
from tests.synthetic import round_to_nearest

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


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gate_of(folder, settings, **changes):
    """The gate on an artifact's or a checkpoint's settings."""
    info = read_info(folder)
    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", 512, info.inputs).tokenizer
    return settings_gate(replace(info, **changes), tokenizer, settings)


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
    assert gate_of(folder, settings).value == 0
    edit_manifest(folder, part, **values)
    gate = gate_of(folder, settings)
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
    assert gate_of(tmp_path / "small", settings).value == 0


def test_prompts_of_a_reranker(folders):
    folder = folders("reranker").artifact
    settings = {"positions": 32768, "prompts": {"own": "Find the law"}, "default_prompt": "own"}
    gate = gate_of(folder, settings)
    assert gate.detail == (
        "prompt 'own': found none, expected 'Find the law'; default prompt: found none, "
        "expected 'own'"
    )
    assert gate.basis == "without layers and tokenizer: record the reference again"
    prompts = {"prompts": {"own": "Find the law"}, "default_prompt": "own"}
    inputs = replace(read_info(folder).inputs, **prompts)
    assert gate_of(folder, settings, inputs=inputs).value == 0


LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": 1000}, "rope_parameters: found {'rope_type': 'default', 'rope_theta': 1000.0}"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: found {'rope_ty"),
    ({"rms_norm_eps": 1e-3}, "rms_norm_eps: found 0.001, expected 1e-06"),
    ({"is_causal": False}, "is_causal: found False, expected True"),
    ({"num_hidden_layers": 1}, "num_hidden_layers: found 1, expected 2"),
    (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "sliding_window: found 8, expected none; layers with a window: found [1], expected []",
    ),
]


@pytest.mark.parametrize(("changes", "words"), LAYERS)
def test_other_layers_of_a_quantized_checkpoint(
    checkpoints, rounded, quantized, copied, changes, words
):
    """In 4 bits a small model's results are within the limits all the same."""
    settings = open_live(checkpoints("kv8"), device="cpu").settings()
    assert gate_of(quantized("gptq"), settings).value == 0
    folder = copied(rounded("gptq"))  # as of another tool: without a manifest
    assert gate_of(folder, settings).value == 0
    edit(folder / "config.json", **changes)
    gate = gate_of(folder, settings)
    assert gate.failed
    assert gate.detail.startswith(words)


def test_yarn_in_a_quantized_checkpoint(checkpoints, copied, tmp_path):
    """It is written in another form, for transformers 4 and 5, and says the same."""
    source = copied(checkpoints("kv8"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000}
    edit(source / "config.json", rope_scaling=None, rope_parameters=yarn)
    round_to_nearest(source, tmp_path / "quantized", "gptq", group_size=32)
    settings = open_live(source, device="cpu").settings()
    assert gate_of(tmp_path / "quantized", settings).value == 0


def exchange_merges(values):
    merges = values["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def exchange_ids(values):
    vocabulary = values["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def split_contractions(values):
    pattern = values["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("|'d)", ")")


def normalize_otherwise(values):
    values["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}],
    }


def do_not_normalize(values):
    values["normalizer"] = None


TOKENS = [
    (exchange_merges, "merges: found '"),
    (exchange_ids, "ids of tokens: found '"),
    (split_contractions, "pre_tokenizer: found [{'type': 'Split', "),
    (do_not_normalize, "normalizer: found [], expected [{'type': 'NFC'}]"),
    (normalize_otherwise, "normalizer: found [{'type': 'NFC'}, {'type': 'Lowercase'}"),
]


@pytest.mark.parametrize(("change", "words"), TOKENS)
@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_another_tokenizer(checkpoints, copied, task, change, words):
    """Few texts show it."""
    checkpoint = checkpoints("kv2", task)
    folder = copied(checkpoint)
    settings = open_live(checkpoint, device="cpu").settings()
    # transformers' own class would have a normalizer and a pre-tokenizer of its own.
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert gate_of(folder, settings).value == 0
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    gate = gate_of(folder, settings)
    assert gate.value == 1
    assert gate.detail.startswith(words)


def test_a_tokenizer_that_transformers_wrote(checkpoints, copied):
    from transformers import Qwen2Tokenizer

    checkpoint = checkpoints("kv2")
    folder = copied(checkpoint)
    Qwen2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    settings = open_live(checkpoint, device="cpu").settings()
    assert gate_of(folder, settings).value == 0
    lower = json.dumps({"do_lower_case": True})
    (folder / "sentence_bert_config.json").write_text(lower)
    assert gate_of(folder, open_live(folder, device="cpu").settings()).value == 0
