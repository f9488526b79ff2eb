"""LangChain: python langchain_.py ARTIFACT INPUTS.json OUTPUT.npz."""

import json
import sys
from pathlib import Path

import numpy as np
from langchain_huggingface import HuggingFaceEmbeddings

artifact, inputs, output = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
model = HuggingFaceEmbeddings(
    model_name=artifact,
    model_kwargs={"backend": "onnx", "model_kwargs": {"provider": "CPUExecutionProvider"}},
    query_encode_kwargs={"prompt_name": "query"},
)
np.savez(output, values=np.stack([model.embed_query(text) for text in values["texts"]]))
