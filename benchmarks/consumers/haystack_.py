"""Haystack: python haystack_.py ARTIFACT INPUTS.json OUTPUT.npz."""

import json
import sys
from pathlib import Path

import numpy as np
from haystack.components.embedders import SentenceTransformersTextEmbedder

artifact, inputs, output = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
model = SentenceTransformersTextEmbedder(
    model=artifact,
    backend="onnx",
    prefix=values["prompt"],
    model_kwargs={"provider": "CPUExecutionProvider"},
    progress_bar=False,
)
if hasattr(model, "warm_up"):
    model.warm_up()
np.savez(output, values=np.stack([model.run(text)["embedding"] for text in values["texts"]]))
