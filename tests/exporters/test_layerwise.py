"""Layers and their segments, run before there is an artifact, and the moments of their inputs."""

import json

import numpy as np
import pytest

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.weights import Weights
from embedport.exporters.calibration import layerwise, moments
from embedport.exporters.calibration.layerwise import (
    BLOCK,
    Layer,
    Segment,
    embed_rows,
    final_vectors,
)
from embedport.exporters.graph.ort_dialect import OrtDialect
from embedport.exporters.graph.precision import PRECISIONS
from embedport.exporters.graph.qwen3 import Design
from tests.synthetic import edit

# The projections that share an input, by the first of them.
READERS = {
    "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
ROWS = [np.arange(5, 5 + size) for size in (1, 9, 40)]


@pytest.mark.parametrize("causal", [True, False])
def test_segments_compute_the_layer(checkpoints, copied, tmp_path, monkeypatch, causal):
    """Their inputs of projections are those of transformers."""
    import torch
    from transformers import AutoModel

    folder = copied(checkpoints("kv2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": causal}))
    block = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    values = {name: [] for name in ("", *READERS)}
    ended = []
    for name, seen in values.items():
        block.layers[1].get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].numpy())
        )
    block.layers[1].register_forward_hook(lambda module, inputs, out: ended.append(out.numpy()))
    with torch.no_grad():
        for ids in ROWS:
            block(input_ids=torch.from_numpy(ids)[None])
    weights = Weights(ModelSpec.from_checkpoint(folder))
    design = Design(weights, OrtDialect(), PRECISIONS["fp32"])
    states, inputs = list(values[""]), []
    for stage, name in enumerate([*READERS, None]):
        with Segment(design, 1, tmp_path, stage) as segment:
            inputs = segment.run(ROWS, states, inputs)
            assert segment.names == [f"layers.1.{each}" for each in READERS.get(name, ())]
        for found, expected in zip(inputs, values.get(name, []), strict=True):
            np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-5)
    with Layer(design, 1, tmp_path) as layer:
        for i, ids in enumerate(ROWS):
            np.testing.assert_allclose(states[i], ended[i], rtol=1e-4, atol=1e-5)
            whole = layer.run(ids, values[""][i])
            np.testing.assert_allclose(whole, ended[i], rtol=1e-4, atol=1e-5)
        # Several states of a text, two at a time.
        monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", 2 * len(ROWS[0]))
        several = np.concatenate([values[""][0] * factor for factor in (1, 2, 3)])
        each = [layer.run(ROWS[0], state[None]) for state in several]
        np.testing.assert_allclose(
            layer.run(ROWS[0], several), np.concatenate(each), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_final_vectors_are_those_of_load(checkpoints, copied, tmp_path, mode):
    """By which a search judges."""
    folder = copied(checkpoints("kv2"))
    edit(folder / "1_Pooling" / "config.json", pooling_mode=mode)
    weights = Weights(ModelSpec.from_checkpoint(folder))
    design = Design(weights, OrtDialect(), PRECISIONS["fp32"])
    states = embed_rows(weights, ROWS)
    for number in range(weights.spec.num_layers):
        with Layer(design, number, tmp_path) as layer:
            states = [layer.run(ids, state) for ids, state in zip(ROWS, states, strict=True)]
    expected = embedport.load_embedder(folder, device="cpu").embed_rows(ROWS)
    assert (final_vectors(design, states) * expected).sum(axis=1).min() > 0.999  # torch's in bf16


def test_embeddings_are_read_in_blocks(checkpoints, monkeypatch):
    """Each read opens the file: one for each token takes seconds of a real table."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv2")))
    table = weights.read_fp32("embed_tokens.weight")
    last = len(table) - 1
    rows = [np.array([last, 0, BLOCK, 0]), np.arange(BLOCK - 9, BLOCK + 9), np.arange(9)]
    read, reads = weights.read, []
    monkeypatch.setattr(weights, "read", lambda *args: reads.append(args) or read(*args))
    for ids, found in zip(rows, embed_rows(weights, rows), strict=True):
        np.testing.assert_array_equal(found, table[ids][None])
    assert len(reads) == len({0, 1, last // BLOCK})


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
