"""optimum: python optimum_.py ARTIFACT INPUTS.json OUTPUT.npz; ids are given, no tokenizer runs."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification

artifact, inputs, output = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
is_reranker = "pairs" in values
kind = ORTModelForSequenceClassification if is_reranker else ORTModelForFeatureExtraction
model = kind.from_pretrained(artifact, subfolder="onnx", file_name="model.onnx")
results = []
for row in values["ids"]:
    ids = torch.tensor([row])
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if is_reranker:
        results.append(outputs.logits[0].sigmoid().numpy()[0])
    else:
        vector = outputs.last_hidden_state[0, -1]
        results.append((vector / vector.norm()).numpy())
np.savez(output, values=np.stack(results))
