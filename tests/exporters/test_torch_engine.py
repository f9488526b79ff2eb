"""Calibration in torch: the same segments and the same codes as on the CPU, on torch's CPU."""

import json

import numpy as np
import pytest

from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.weights import Weights
from embedport.errors import CheckpointError, DeviceError, InputError
from embedport.exporters.calibration import gptq_awq
from embedport.exporters.calibration.engines import CpuEngine, open_engine
from embedport.exporters.calibration.gptq_awq import quantize_layers, scale_layers
from embedport.exporters.calibration.layerwise import STAGES, embed_rows
from embedport.exporters.calibration.torch_engine import TorchEngine
from embedport.quantize.formats import TABLE, Format, plan_formats
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from tests.pipeline.conftest import add_biases

ROWS = [np.random.default_rng(i).integers(0, 1000, size) for i, size in enumerate((1, 9, 80))]


def read(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    weights = Weights(ModelSpec.from_checkpoint(folder))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats[TABLE]
    return weights, formats


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"is_causal": False},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
        {"attention_bias": True},
    ],
    ids=["causal", "both ways", "window", "yarn", "biases"],
)
def test_segments(checkpoints, copied, tmp_path, config):
    """Before anything is quantized, and with quantized projections but for their activations."""
    folder = copied(checkpoints("kv2"))
    if "attention_bias" in config:
        add_biases(folder, seed=0)
    weights, formats = read(folder, **config)
    engines = [CpuEngine(weights, formats, tmp_path), TorchEngine(weights, formats, "cpu")]
    names = [name for name in formats if name.startswith("layers.0.")]
    done = {
        name: quantize_rtn(weights.read_fp32(f"{name}.weight"), formats[name].scheme)
        for name in names
    }
    for quantized, tolerance in (({}, 1e-4), (done, 0.02)):
        states = [embed_rows(weights, ROWS) for _ in engines]
        inputs = [[], []]
        for stage in range(STAGES + 1):
            for i, engine in enumerate(engines):
                with engine.segment(0, stage, quantized) as segment:
                    inputs[i] = segment.run(ROWS, states[i], inputs[i])
                    assert segment.names == [n for n in names if n in segment.names]
            for found, expected in (inputs, states):
                for a, b in zip(found, expected, strict=True):
                    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("precision", ["int4", "int8", "nf4"])
def test_codes(checkpoints, tmp_path, follows, precision):
    weights, formats = read(checkpoints("kv2"))
    if precision == "nf4":
        nf4 = Format(QuantScheme(4, 64, symmetric=True, nf4=True))
        formats = dict.fromkeys(formats, nf4)
    else:
        formats = plan_formats(weights.spec, precision, dialect="ort")
    random = np.random.default_rng(0)
    mixing = random.normal(size=(64, 64))
    y = [(random.normal(size=(size, 64)) @ mixing).astype(np.float32) for size in (300, 9, 1)]
    x = [(a + random.normal(0, 0.1, a.shape)).astype(np.float32) for a in y] if follows else []
    names = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    expected, found = (
        engine.quantize(names, y, x, 10)
        for engine in (CpuEngine(weights, formats, tmp_path), TorchEngine(weights, formats, "cpu"))
    )
    hidden = np.concatenate(y)
    for name in names:
        weight = weights.read_fp32(f"{name}.weight")
        losses = [
            np.square(hidden @ (codes[name].dequantize() - weight).T).sum()
            for codes in (expected, found)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)
        assert (found[name].codes == expected[name].codes).mean() >= 0.999
        np.testing.assert_allclose(found[name].scales, expected[name].scales, rtol=1e-4)


def test_layers(checkpoints, tmp_path, monkeypatch):
    """Whole layers: AWQ's factors, then GPTAQ's errors at the end of the model.

    They are measured with exact activations, which the CPU's compensation does not assume.
    """
    weights, formats = read(checkpoints("kv2"))
    results = []
    for engine in (CpuEngine(weights, formats, tmp_path), TorchEngine(weights, formats, "cpu")):
        monkeypatch.setattr(gptq_awq, "open_engine", lambda *args, engine=engine: engine)
        folder = tmp_path / type(engine).__name__
        factors, _ = scale_layers(weights, weights, formats, ROWS, folder, lambda: None)
        quantize = quantize_layers(weights, weights, formats, ROWS, folder / "codes", lambda: None)
        done = {name: quantize(name) for name in formats}
        losses = []
        for chosen in ({}, done):
            states, inputs = embed_rows(weights, ROWS), []
            for layer in range(weights.spec.num_layers):
                prefix = f"layers.{layer}."
                mine = {name: chosen[name] for name in chosen if name.startswith(prefix)}
                inputs = []
                for stage in range(STAGES + 1):
                    with TorchEngine(weights, formats, "cpu").segment(layer, stage, mine) as part:
                        inputs = part.run(ROWS, states, inputs)
            losses.append(np.concatenate([state[0] for state in states]))
        gains = factors.read_fp32("layers.1.post_attention_layernorm.weight")
        results.append((np.square(losses[1] - losses[0]).mean(), gains))
    assert results[1][0] < 1.01 * results[0][0]
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-2)


def test_devices(checkpoints, tmp_path):
    weights, formats = read(checkpoints("kv2"))
    with pytest.raises(InputError, match="device should be one of cpu, cuda, found 'gpu'"):
        open_engine("gpu", weights, formats, tmp_path)
    with pytest.raises(DeviceError, match="no CUDA device here: calibrate with `device` cpu"):
        open_engine("cuda", weights, formats, tmp_path)


def test_inputs_that_are_not_finite(checkpoints, tmp_path):
    weights, formats = read(checkpoints("kv2"))
    engine = TorchEngine(weights, formats, "cpu")
    with pytest.raises(CheckpointError, match="not finite"):
        engine.quantize(["layers.0.self_attn.q_proj"], [np.full((3, 64), np.nan, "f")], [], 1)
