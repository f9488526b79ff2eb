"""Checkpoints of other libraries, and what is compared of them."""

import json

import embedport
from embedport.texts.samples import builtin_samples
from tests.synthetic import Geometry

TEXTS = [sample.text for sample in builtin_samples()][:8]
GEOMETRY = Geometry(32, 1, 2, 2, 16, 128)
MATRIX = "layers.0.mlp.down_proj"
IGNORED = "layers.0.self_attn.v_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def set_config(folder, config):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(values))


def vectors(folder):
    model = embedport.load(folder, device="cpu")
    assert isinstance(model, embedport.Embedder)
    return model.encode(TEXTS)


def assert_alike(found, expected, limit=0.99999):
    assert (found * expected).sum(axis=1).min() > limit


def tensors_of(**weights):
    group = {"targets": ["Linear"], "weights": WEIGHTS | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
