"""OpenVINO's runtime: python openvino_.py ARTIFACT INPUTS.json OUTPUT.npz HINT."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino

artifact, inputs, output, hint = sys.argv[1:]
rows = json.loads(Path(inputs).read_text(encoding="utf-8"))["ids"]
model = openvino.Core().compile_model(
    str(Path(artifact, "openvino", "openvino_model.xml")),
    "CPU",
    {"INFERENCE_PRECISION_HINT": hint},
)
names = [value.any_name for value in model.outputs]
name = "score" if "score" in names else "sentence_embedding"
results = []
for row in rows:
    ids = np.array([row], np.int64)
    results.append(model({"input_ids": ids, "attention_mask": np.ones_like(ids)})[name][0])
np.savez(output, values=np.stack(results))
