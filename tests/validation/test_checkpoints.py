"""validate() on checkpoints: every method, plain ones, the page, what is recorded."""

import json
from typing import Any

import pytest

import embedport
from embedport.artifact.folder import Artifact
from embedport.runtimes import read_info
from embedport.texts.samples import builtin_pairs, builtin_samples
from embedport.validation.layers import layer_errors
from embedport.validation.opening import open_live

METHODS = ("bnb-int8", "bnb-nf4", "gptq", "awq", "w8a8", "fp8")
SLOW = ("bnb-int8", "gptq", "fp8")
SAMPLES = [sample for sample in builtin_samples() if len(sample.text) < 200]
PAIRS = [pair for pair in builtin_pairs() if len(pair.document) < 200]


def validate(folder, checkpoint, task, **options):
    inputs: dict[str, Any] = {"texts": SAMPLES} if task == "embedding" else {"pairs": PAIRS}
    return embedport.validate(folder, checkpoint, device="cpu", **inputs, **options)


@pytest.mark.parametrize(
    "method",
    # Each of the slow ones is read as another: by the same library, or as the same layers.
    [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in METHODS],
)
@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_every_method_passes(quantized, checkpoints, task, method):
    # Similarities of a random model of width 128 move farther in fp8 than a trained one's.
    options = {"max_score_difference": 0.1} if method == "fp8" else {}
    report = validate(
        quantized(method, task), checkpoints("kv8", task), task, record=False, **options
    )
    assert report.passed, report.gates
    assert (report.precision, report.device, report.task) == (method, "cpu", task)
    assert len(report.invariance) == 12
    # On a CPU onnxruntime multiplies by codes of 4 bits.
    assert (report.machine.code == "torch") == (method not in ("gptq", "awq"))
    assert {"torch", "transformers", "bitsandbytes"} <= report.versions.keys()


@pytest.mark.parametrize(
    ("task", "dtype", "precision"),
    [
        ("reranker", "bfloat16", "bf16"),
        pytest.param("embedding", "float32", "fp32", marks=pytest.mark.slow),
        pytest.param("embedding", "float16", "fp16", marks=pytest.mark.slow),
        pytest.param("embedding", "bfloat16", "bf16", marks=pytest.mark.slow),
        pytest.param("reranker", "float32", "fp32", marks=pytest.mark.slow),
        pytest.param("reranker", "float16", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_plain_checkpoint_passes_and_stays_as_it_is(checkpoints, task, dtype, precision):
    folder = checkpoints("kv2", task, dtype=dtype)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    report = validate(folder, folder, task)
    assert report.passed, report.gates
    words = "fp32" if dtype == "float32" else "fp32 on fp16-rounded weights"
    assert report.comparisons[0].reference == f"{words}, cpu"
    assert report.precision == precision
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_damaged_checkpoint_fails(quantized, checkpoints, copied):
    from safetensors.numpy import load_file, save_file

    folder = copied(quantized("gptq"))
    (folder / "embedport.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".qweight"):
            tensors[name] = tensors[name] ^ 0x77777777
    save_file(tensors, folder / "model.safetensors")
    report = validate(folder, checkpoints("kv8"), "embedding")
    assert {gate.name for gate in report.gates if not gate.passed} >= {"minimum cosine"}


def test_figures_and_page(quantized, checkpoints, copied, tmp_path):
    folder = copied(quantized("w8a8"))
    page = tmp_path / "report.html"
    report = validate(folder, checkpoints("kv8"), "embedding", page=page)
    assert Artifact.open(folder).manifest.parity == json.loads(json.dumps(report.to_record()))
    assert report.to_markdown() in (folder / "README.md").read_text()
    text = page.read_text()
    assert "Relative error after each layer" in text
    assert "model.safetensors" in text


def test_layers_of_a_checkpoint(checkpoints, quantized):
    reference = open_live(checkpoints("kv8"), task="embedding", max_length=512)
    info = read_info(quantized("gptq"))
    rows = [[5, 6, 7, 8], list(range(40))]
    table, first, second = layer_errors(info, reference, rows)
    assert (table.layer, second.layer) == (0, 2)
    # The table has the reference's values; four bits show from the first layer on.
    assert table.relative_error_max < 1e-2
    assert 1e-2 < first.relative_error_mean < 0.5
    assert first.cosine_min > 0.9
