"""After a failed gate: the layer, the next better precision and its size."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import embedport
from embedport.artifact.folder import Artifact
from embedport.artifact.sizes import graph_sizes
from embedport.runtimes import read_info
from embedport.validation.advice import next_steps, other_weights
from embedport.validation.layers import LayerError, largest_growth
from embedport.validation.opening import open_live
from embedport.validation.report import Gate

WITNESSES = True
TEXTS = ["one text", "another", "A leaf falls."]
HIGH = 1 - 1e-12


def layers(*errors):
    return [LayerError(i, 9, error, error, 0.9) for i, error in enumerate(errors)]


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """An int8-weight artifact with its witness."""
    checkpoint = checkpoints("kv2", "embedding")
    folder = tmp_path_factory.mktemp("artifact") / "model"
    embedport.export(checkpoint, folder, precision="int8-weight")
    return SimpleNamespace(artifact=folder, checkpoint=checkpoint)


def origin_of(made):
    return open_live(
        made.checkpoint,
        task="embedding",
        adapter=None,
        max_length=None,
        revision=None,
        device="cpu",
    ).origin


def test_an_artifact_that_fails_names_the_layer_and_the_next_precision(made, folders, tmp_path):
    page = tmp_path / "report.html"
    report = embedport.validate(
        made.artifact,
        made.checkpoint,
        TEXTS,
        device="cpu",
        record=False,
        min_cosine=HIGH,
        page=page,
    )
    layer, better = report.next_steps
    assert re.match(r"The error grows most in layer [12]: .* layers\.[01]\.\*", layer)
    found = re.search(r"export with `--precision fp32`, about (\S+) kB", better)
    assert found is not None, better
    # What an artifact of this precision really takes.
    parts = graph_sizes(Artifact.open(folders("embedding").artifact).graph)
    size = sum(sum(sizes.values()) for sizes in parts.values())
    assert float(found[1]) * 1000 == pytest.approx(size, rel=0.01)
    assert "The error grows most in layer" in page.read_text()
    assert all(f"- {step}" in report.to_markdown() for step in report.next_steps)
    assert report.machine.code.startswith(("embedport's kernels for", "onnxruntime's operators"))
    assert "| Exported on | " in report.to_markdown()
    assert f"| Computed by | {report.machine.code} |" in report.to_markdown()


def test_an_artifact_that_holds_asks_for_nothing(folders):
    made = folders("embedding")
    report = embedport.validate(made.artifact, made.checkpoint, TEXTS, device="cpu", record=False)
    assert report.passed
    assert report.next_steps == ()


def test_the_largest_growth_is_of_layers_with_as_many_tokens():
    errors = layers(0.0, 0.1, 0.3, 0.4)
    pair = largest_growth([*errors, LayerError(4, 2, 9.0, 9.0, 0.1)])
    assert pair == (errors[1], errors[2])
    assert largest_growth([]) is None
    assert largest_growth(layers(0.1)) is None
    assert largest_growth(layers(0.1, float("nan"))) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inputs with other token ids", "tokenizer.json"),
        ("reference results with NaN", "The reference itself gives NaN"),
        ("MTEB: reference's NaN", "The reference itself gives NaN"),
        ("minimum cosine", "Next better precision: export with `--precision fp32`"),
    ],
)
def test_steps_fit_the_gate(made, name, words):
    info, origin = read_info(made.artifact), origin_of(made)
    (*_, last) = next_steps([Gate(name, 1, "≤", 0)], info, origin, ())
    assert words in last
    other = replace(origin, files=dict.fromkeys(origin.files, "0" * 64))
    first, *_ = next_steps([Gate(name, 1, "≤", 0)], info, other, ())
    assert first.startswith("Compare it with its own checkpoint: the artifact was made from")


def test_the_original_of_a_quantized_checkpoint_may_have_any_weights(made):
    """An artifact of the quantized one names it as its reference, and does not know its files.

    Its own precision, fp32 as a rule, says nothing of the error.
    """
    info, origin = read_info(made.artifact), origin_of(made)
    other = replace(origin, files=dict.fromkeys(origin.files, "0" * 64), adapter="a/lora")
    assert "has the sha256" in other_weights(info, other)
    assert "without an adapter" in other_weights(info, replace(origin, adapter="a/lora"))
    artifact = info.artifact
    assert artifact is not None
    source = replace(artifact.manifest.source, original=("--reference", "a/base"))
    artifact = replace(artifact, manifest=replace(artifact.manifest, source=source))
    info = replace(info, artifact=artifact)
    assert other_weights(info, other) == ""
    (step,) = next_steps([Gate("minimum cosine", 0.98, "≥", 0.99)], info, other, ())
    assert step.startswith("The checkpoint that it was made from is quantized")


def test_a_layer_that_is_not_quantized_is_only_named(folders):
    made = folders("embedding")
    gates = [Gate("minimum cosine", 0.5, "≥", 0.9)]
    layer, _ = next_steps(gates, read_info(made.artifact), origin_of(made), layers(0.0, 0.1, 0.3))
    assert layer.startswith("The error grows most in layer 2: ")
    assert layer.endswith(" after it.")


def test_4_bits_rounded_to_nearest_are_calibrated_first(folders):
    made = folders("embedding", precision="int4")
    gates = [Gate("minimum cosine", 0.5, "≥", 0.9)]
    hint, calibrate, groups, better = next_steps(
        gates, read_info(made.artifact), origin_of(made), None
    )
    assert "--report report.html" in hint
    assert "without `--fast`" in calibrate
    assert "--group-size 32" in groups
    assert "--precision int8-weight" in better
