"""LlamaIndex: python llama_index_.py ARTIFACT INPUTS.json OUTPUT.npz."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

artifact, inputs, output = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
model = HuggingFaceEmbedding(
    artifact,
    backend="onnx",
    query_instruction=values["prompt"],
    model_kwargs={"provider": "CPUExecutionProvider"},
)
np.savez(output, values=np.stack([model.get_query_embedding(text) for text in values["texts"]]))
