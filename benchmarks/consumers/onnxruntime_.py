"""Plain onnxruntime: python onnxruntime_.py ARTIFACT INPUTS.json OUTPUT.npz; no package of ours."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

artifact, inputs, output = sys.argv[1:]
rows = json.loads(Path(inputs).read_text(encoding="utf-8"))["ids"]
session = onnxruntime.InferenceSession(
    str(Path(artifact, "onnx", "model.onnx")), providers=["CPUExecutionProvider"]
)
names = [value.name for value in session.get_outputs()]
name = "score" if "score" in names else "sentence_embedding"
size = max(map(len, rows))
values = []
for left in (False, True):
    ids = np.zeros((len(rows), size), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(size - len(row), size) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    values.append(session.run([name], {"input_ids": ids, "attention_mask": mask})[0])
# Either padding side must give the same.
np.savez(output, values=np.stack(values))
