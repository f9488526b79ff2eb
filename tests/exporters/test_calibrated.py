"""GPTQ and AWQ on whole models: closer than rounding, the same after an interruption."""

from typing import Any

import numpy as np
import pytest

import embedport
from embedport.demo.samples import builtin_samples
from embedport.demo.synthetic import plant_outliers
from embedport.exporters.onnx import calibrated
from embedport.exporters.onnx.calibrated import quantize_layers, scale_layers
from embedport.exporters.onnx.formats import plan_formats
from embedport.exporters.onnx.graph import Design
from embedport.exporters.onnx.layerwise import Layer, embed_rows
from embedport.exporters.onnx.ort_dialect import OrtDialect
from embedport.exporters.onnx.precision import PRECISIONS
from embedport.spec import ModelSpec
from embedport.weights import Weights

TEXTS = [sample.text for sample in builtin_samples()]
ROWS = [np.random.default_rng(i).integers(0, 1000, 30) for i in range(4)]


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_gptq_is_closer_than_rounding(artifacts, task):
    pairs = [(a, b) for a, b in zip(TEXTS[:16], TEXTS[16:32], strict=True)]

    def outputs(**options):
        runtime = artifacts("kv1", task, **options)
        return runtime.encode(TEXTS) if task == "embedding" else runtime.score(pairs)

    def error(algorithm):
        options = {"precision": "int4", "group_size": 32, "embedding_bits": 8}
        return ((outputs(algorithm=algorithm, **options) - outputs()) ** 2).mean()

    assert error("gptq") < 0.75 * error("rtn")


def test_awq_on_outliers(checkpoints, copied, tmp_path):
    """Channels that the inputs make large lose less than under plain rounding."""
    folder = copied(checkpoints("kv8"))
    plant_outliers(folder, magnitude=30)

    def vectors(name, **options):
        embedder = embedport.load(embedport.export(folder, tmp_path / name, **options).folder)
        assert isinstance(embedder, embedport.Embedder)
        return embedder.encode(TEXTS)

    options = {"precision": "int4", "embedding_bits": 8}
    fp32 = vectors("fp32")
    errors = [
        ((vectors(name, algorithm=name, **options) - fp32) ** 2).mean() for name in ("hqq", "awq")
    ]
    assert errors[1] < 0.9 * errors[0]


def test_awq_counts_an_error_by_what_it_is_multiplied_with(checkpoints, tmp_path):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats["embed_tokens"]
    folded, importance = scale_layers(
        weights, weights, formats, ROWS, tmp_path / "layers", lambda: None
    )
    states = embed_rows(folded, ROWS)
    with Layer(Design(folded, OrtDialect(), PRECISIONS["fp32"]), 0, tmp_path) as layer:
        inputs = [layer.run_inputs(*each) for each in zip(ROWS, states, strict=True)]
        for number, names in enumerate(layer.inputs):
            squares = np.square(np.concatenate([each[number] for each in inputs])).mean(axis=0)
            for name in names:
                np.testing.assert_allclose(importance(name), squares, rtol=1e-3)


def test_awq_takes_tokens_from_all_places():
    """Not every text's first, which is the same for all that begin alike."""

    class Fake:
        inputs = (["layers.0.mlp.up_proj"],)

        def run_inputs(self, ids, state):
            return [ids[:, None].astype(np.float32)]

    rows = [np.arange(40)] * 600
    layer: Any = Fake()
    (found,) = calibrated._samples(layer, rows, rows).values()
    places, counts = np.unique(found, return_counts=True)
    assert len(found) == -(-600 * 40 // (600 * 40 // calibrated.SAMPLE))
    assert len(places) >= 20
    assert counts.max() < 2 * counts.mean()


def test_the_manifest_says_what_it_was_calibrated_on(artifacts):
    options = {"precision": "int4", "group_size": 32, "embedding_bits": 8, "algorithm": "gptq"}
    recipe = artifacts("kv1", **options).artifact.manifest.recipe
    assert recipe["algorithm"] == "gptq"
    assert recipe["calibration"]["source"] == "built-in"
    assert recipe["calibration"]["texts"] == len(TEXTS)
    assert len(recipe["calibration"]["sha256"]) == 64


def test_an_interrupted_run_goes_on(checkpoints, tmp_path, monkeypatch):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats["embed_tokens"]
    quantized = []
    real = calibrated.quantize_gptq

    def counted(*arguments):
        quantized.append(1)
        return real(*arguments)

    monkeypatch.setattr(calibrated, "quantize_gptq", counted)

    def run(folder, layers=None):
        done = iter(range(layers or 99))

        def advance():
            if next(done) + 1 == layers:
                raise KeyboardInterrupt

        return quantize_layers(weights, weights, formats, ROWS, folder, advance)

    whole = run(tmp_path / "whole")
    assert len(quantized) == 3 * 7
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", layers=2)
    quantized.clear()
    resumed = run(tmp_path / "parts")
    assert len(quantized) == 7
    for name in formats:
        np.testing.assert_array_equal(resumed(name).codes, whole(name).codes)
    # Other texts are another request: nothing is taken over.
    quantized.clear()
    quantize_layers(weights, weights, formats, ROWS[:2], tmp_path / "parts", lambda: None)
    assert len(quantized) == 3 * 7


def test_nothing_is_left_beside_the_artifact(checkpoints, tmp_path):
    embedport.export(checkpoints("kv1"), tmp_path / "out", precision="int4", algorithm="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
