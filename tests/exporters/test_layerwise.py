"""Layers and their segments, run before there is an artifact, and the moments of their inputs."""

import json

import numpy as np
import pytest

from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.weights import Weights
from embedport.exporters.calibration import moments
from embedport.exporters.calibration.layerwise import STAGES, Layer, Segment, embed_rows
from embedport.exporters.graph.ort_dialect import OrtDialect
from embedport.exporters.graph.precision import PRECISIONS
from embedport.exporters.graph.qwen3 import Design

ROWS = [np.arange(5, 5 + size) for size in (1, 9, 40)]


@pytest.mark.parametrize("causal", [True, False])
def test_segments_compute_the_layer(checkpoints, copied, tmp_path, causal):
    folder = copied(checkpoints("kv2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": causal}))
    weights = Weights(ModelSpec.from_checkpoint(folder))
    design = Design(weights, OrtDialect(), PRECISIONS["fp32"])
    states = embed_rows(weights, ROWS)
    ended, inputs, stages = list(states), [], []
    for stage in range(STAGES + 1):
        with Segment(design, 1, tmp_path, stage) as segment:
            inputs = segment.run(ROWS, ended, inputs)
            stages.append((segment.names, list(inputs)))
    assert stages.pop() == ([], [])
    with Layer(design, 1, tmp_path) as layer:
        assert [names for names, _ in stages] == layer.inputs
        for i, (ids, state) in enumerate(zip(ROWS, states, strict=True)):
            for (_, found), expected in zip(stages, layer.run_inputs(ids, state), strict=True):
                np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(ended[i], layer.run(ids, state), rtol=1e-4, atol=1e-5)


def test_moments_are_means_over_tokens(monkeypatch):
    """In blocks of any size; a text's last token counts more often."""
    random = np.random.default_rng(0)
    y = [random.normal(size=(size, 6)).astype(np.float32) for size in (1, 4, 30, 2)]
    x = [text + random.normal(0, 0.1, text.shape).astype(np.float32) for text in y]
    seen = [np.concatenate([text, *[text[-1:]] * 2]) for text in y]
    real = [np.concatenate([text, *[text[-1:]] * 2]) for text in x]
    difference = np.concatenate(real) - np.concatenate(seen)
    count = 37 + 2 * 4
    for block in (1, 20, 1000):
        monkeypatch.setattr(moments, "BLOCK", block)
        hessian, cross = moments.measure_moments(y, x, 3)
        assert cross is not None
        expected = np.concatenate(seen).T @ np.concatenate(seen) / count
        np.testing.assert_allclose(hessian, expected, atol=1e-6)
        np.testing.assert_allclose(cross, difference.T @ np.concatenate(seen) / count, atol=1e-6)
    assert moments.measure_moments(y, [], 1).cross is None
