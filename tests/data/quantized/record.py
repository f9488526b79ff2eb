"""Write the files beside this one: matrices that other libraries quantized, and their values.

    uv venv other && uv pip install --python other/bin/python auto-round gptqmodel .
    GPTQMODEL_CPU_WORKERS=2 other/bin/python tests/data/quantized/record.py gptqmodel auto-round
    uv pip install --python other/bin/python compressed-tensors==0.12.2
    other/bin/python tests/data/quantized/record.py compressed-tensors-0.12

Each library quantizes a model of one layer, and unpacks it again when it is loaded, or as its
documentation says; layers.0.mlp.down_proj, [32, 128], is kept. A file holds, for each case:
"CASE/config" (its quantization_config as JSON), "CASE/PART" (the stored tensors, without the
matrix's name), "CASE/expected" (what the library makes of them, [out, in], in its own dtype;
bfloat16 as float32). Recorded with gptqmodel 7.7.0, auto-round 0.16.1 and compressed-tensors
0.12.2, with torch 2.15 and transformers 5.24 on a CPU.
"""

import gc
import json
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

from embedport.texts.samples import builtin_samples
from tests.synthetic import Geometry, train_tokenizer, write_checkpoint

HERE = Path(__file__).parent
GEOMETRY = Geometry(32, 1, 2, 2, 16, 128)
MATRIX = "model.layers.0.mlp.down_proj"
TEXTS = [sample.text * 8 for sample in builtin_samples() if 20 < len(sample.text) < 200][:8]
GPTQ = {
    "act-order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "act-order-v2": {
        **{"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        "format": "gptq_v2",
    },
    "act-order-8": {"bits": 8, "group_size": 32, "desc_act": True, "sym": True},
    "row": {"bits": 4, "group_size": -1, "desc_act": False, "sym": True},
    "row-8-act-order": {"bits": 8, "group_size": -1, "desc_act": True, "sym": False},
    "ordered": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False},
}
AUTO_ROUND = {
    "symmetric": ({"bits": 4, "group_size": 32, "sym": True}, "auto_round"),
    "asymmetric": ({"bits": 4, "group_size": 32, "sym": False}, "auto_round"),
    "gptqmodel": ({"bits": 4, "group_size": 32, "sym": False}, "auto_round:gptqmodel"),
    "row-8": ({"bits": 8, "group_size": -1, "sym": True}, "auto_round"),
    "mixed": (
        {
            **{"bits": 4, "group_size": 32, "sym": True},
            "layer_config": {MATRIX: {"bits": 8, "group_size": 64}},
        },
        "auto_round",
    ),
}


def keep(cases, name, folder, expected):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for noise in ("meta", "autoround_version"):
        config.pop(noise, None)
    cases[f"{name}/config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    tensors = load_file(folder / "model.safetensors")
    for part, value in tensors.items():
        if part.startswith(f"{MATRIX}."):
            cases[f"{name}/{part.removeprefix(MATRIX + '.')}"] = to_numpy(value)
    cases[f"{name}/expected"] = to_numpy(expected)


def to_numpy(value):
    value = value.detach().contiguous()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def record_gptq(tiny, scratch):
    gptqmodel: Any = import_module("gptqmodel")
    on_cpu = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH}
    cases = {}
    for name, options in GPTQ.items():
        config = gptqmodel.QuantizeConfig(**options, act_group_aware=False)
        model = gptqmodel.GPTQModel.load(str(tiny), config, **on_cpu)
        model.quantize(TEXTS, batch_size=1, backend=on_cpu["backend"])
        model.save(str(scratch / name))
        model = gptqmodel.GPTQModel.load(str(scratch / name), dtype=torch.float16, **on_cpu)
        module = dict(model.model.named_modules())[MATRIX]
        keep(cases, name, scratch / name, module.dequantize_weight().T)
    return cases


def record_auto_round(tiny, scratch):
    auto_round: Any = import_module("auto_round")

    cases = {}
    for name, (options, form) in AUTO_ROUND.items():
        quantizer = auto_round.AutoRound(
            AutoModelForCausalLM.from_pretrained(tiny),
            AutoTokenizer.from_pretrained(tiny),
            **{"iters": 0, "seqlen": 32, "nsamples": 4, "dataset": TEXTS, "device_map": "cpu"},
            **options,
        )
        quantizer.quantize_and_save(str(scratch / name), format=form)
        (config,) = (scratch / name).rglob("config.json")
        model = AutoModelForCausalLM.from_pretrained(
            config.parent, quantization_config=AutoRoundConfig(), dtype=torch.float16
        )
        module = dict(model.named_modules())[MATRIX]
        identity = torch.eye(GEOMETRY.intermediate_size, dtype=torch.float16)
        with torch.no_grad():
            keep(cases, name, config.parent, module(identity).T)
        del quantizer, model
        gc.collect()
    return cases


def record_compressed_tensors():
    """Act-order in groups ("group"), which later versions no longer have."""
    compressors: Any = import_module("compressed_tensors.compressors")
    quantization: Any = import_module("compressed_tensors.quantization")
    forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")

    cases = {}
    rng = torch.Generator().manual_seed(0)
    for name, symmetric in (("group", True), ("group-asymmetric", False)):
        args = quantization.QuantizationArgs(
            num_bits=4, group_size=32, symmetric=symmetric, actorder="group"
        )
        weight = torch.randn((32, 128), generator=rng)
        order = torch.randperm(128, generator=rng) // 32
        scales = (torch.rand((32, 4), generator=rng) / 4 + 0.1).bfloat16()
        zeros = torch.randint(-8, 8, (32, 4), generator=rng, dtype=torch.int8)
        zeros *= not symmetric
        order = order.to(torch.int32)
        # Its own decompress_weight takes no zero points, and its dequantize none of the dtype.
        expected = forward.fake_quantize(weight.bfloat16(), scales, zeros, args, order)
        parts = compressors.PackedQuantizationCompressor().compress_weight(
            weight.bfloat16(), scales, args, zeros, order
        )
        parts |= {"weight_scale": scales, "weight_g_idx": order}
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
            },
            "ignore": [],
        }
        cases[f"{name}/config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
        cases |= {f"{name}/{part}": to_numpy(value) for part, value in parts.items()}
        cases[f"{name}/expected"] = to_numpy(expected)
    return cases


def main():
    for library in sys.argv[1:]:
        with TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            tokenizer = train_tokenizer([sample.text for sample in builtin_samples()], 1024)
            tiny = write_checkpoint(
                scratch / "tiny", GEOMETRY, "reranker", tokenizer, dtype="float16"
            )
            if library == "gptqmodel":
                cases = record_gptq(tiny, scratch)
            elif library == "auto-round":
                cases = record_auto_round(tiny, scratch)
            else:
                cases = record_compressed_tensors()
        np.savez_compressed(HERE / f"{library}.npz", **cases)


if __name__ == "__main__":
    main()
