# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["auto-round==0.16.1", "transformers==5.24.0", "torch==2.15.0"]
# ///
"""AutoRound's 4 bits as its package applies them, with calibration rows that are tokenized.

200 steps of signed gradient descent a layer, batches of 8, its own learning rate.

uv run --script auto_round_recipe.py CHECKPOINT ROWS.npz GROUP symmetric|asymmetric OUT
"""

import sys
from pathlib import Path

# The modules beside this file have names of packages that AutoRound imports.
sys.path.pop(0)

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

# AutoRound wants rows of one length: longer texts are cut, shorter ones padded and masked.
LENGTH = 128

checkpoint, rows_file, group, kind, out = sys.argv[1:]
with np.load(rows_file) as arrays:
    texts = np.split(arrays["ids"], arrays["ends"][:-1])
dataset = []
for text in texts:
    ids, mask = np.zeros((2, 1, LENGTH), np.int64)
    row = text if len(text) <= LENGTH else np.append(text[: LENGTH - 1], text[-1])
    ids[0, : len(row)], mask[0, : len(row)] = row, 1
    dataset.append({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})
quantizer = AutoRound(
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    AutoTokenizer.from_pretrained(checkpoint),
    bits=4,
    group_size=int(group),
    sym=kind == "symmetric",
    dataset=dataset,
    nsamples=len(dataset),
    seqlen=LENGTH,
    device_map="cpu",
)
quantizer.quantize_and_save(out, format="auto_round")
(folder,) = (path.parent for path in Path(out).rglob("config.json"))
for name in ("config.json", "model.safetensors"):
    (folder / name).rename(Path(out) / name)
