# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "olive-ai==0.13.0",
#     "onnxruntime-genai==0.12.2",
#     "transformers==4.52.4",
#     "torch==2.15.0",
#     "accelerate",
#     "datasets",
# ]
# ///
"""Olive's recipe for Qwen3-Embedding on a CPU, with calibration rows that are already tokenized.

https://github.com/microsoft/olive-recipes/tree/main/Qwen-Qwen3-Embedding-0.6B/cpu

uv run --script olive_recipe.py mixed|gptq GROUP CHECKPOINT ROWS.npz OUT
"""

import os
import sys
import tempfile
from pathlib import Path

# The modules beside this file have names of packages that Olive imports.
sys.path.pop(0)
os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

import numpy as np
import torch
from olive.passes.pytorch import quant_utils, selective_mixed_precision
from olive.workflows import run

kind, group, checkpoint, rows_file, out = sys.argv[1:]
four_bits = {"bits": 4, "sym": False, "group_size": int(group)}
eight_bits = {"bits": 8, "sym": False, "group_size": int(group)}
MIXED = {
    "type": "SelectiveMixedPrecision",
    "algorithm": "kld_gradient",
    "high_bits": 8,
    "ratio": 0.65,
}
passes = {
    **({"s": MIXED | four_bits} if kind == "mixed" else {}),
    "g": {"type": "gptq"} | four_bits,
    "r": {
        "type": "rtn",
        "lm_head": True,
        "embeds": True,
        "overrides": {"lm_head": {"bits": 8}, "model.embed_tokens": {"bits": 8}},
    }
    | eight_bits,
    "m": {
        "type": "ModelBuilder",
        "precision": "int4",
        "extra_options": {"include_hidden_states": 1},
    },
    "t": {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]},
}

with np.load(rows_file) as arrays:
    ids = np.split(arrays["ids"], arrays["ends"][:-1])
batches = [
    {"input_ids": row, "attention_mask": torch.ones_like(row)}
    for row in (torch.from_numpy(row)[None] for row in ids)
]
# The recipe takes texts from the hub.
for module in (quant_utils, selective_mixed_precision):
    module.get_calibration_dataset = lambda *_, **__: batches

accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
with tempfile.TemporaryDirectory(dir=Path(out).parent) as cache:
    run(
        {
            "input_model": {
                "type": "HfModel",
                "model_path": checkpoint,
                "load_kwargs": {"torch_dtype": "float16"},
            },
            "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
            "target": "here",
            "passes": passes,
            "output_dir": out,
            "cache_dir": cache,
            "no_artifacts": True,
        }
    )
