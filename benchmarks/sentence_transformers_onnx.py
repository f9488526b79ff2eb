# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "sentence-transformers[onnx]<6",
#     "optimum-onnx[onnxruntime]==0.1.0",
#     "transformers<4.58",
#     "torch==2.15.0",
# ]
# ///
"""sentence-transformers' ONNX backend on an artifact exported with `--output hidden`.

uv run --script sentence_transformers_onnx.py ARTIFACT TEXTS.json VECTORS.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

artifact, texts_file, vectors_file = sys.argv[1:]
texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
model = SentenceTransformer(
    artifact, backend="onnx", model_kwargs={"provider": "CPUExecutionProvider"}
)
np.savez(vectors_file, query=model.encode(texts, prompt_name="query"), document=model.encode(texts))
