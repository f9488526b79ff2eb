"""sentence-transformers: python SCRIPT ARTIFACT INPUTS.json OUTPUT.npz BACKEND."""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

artifact, inputs, output, backend = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
options = {"model_kwargs": {"provider": "CPUExecutionProvider"}} if backend == "onnx" else {}
if "pairs" in values:
    model = CrossEncoder(artifact, backend=backend, **options)
    found = model.predict([tuple(pair) for pair in values["pairs"]])
else:
    model = SentenceTransformer(artifact, backend=backend, **options)
    found = model.encode(values["texts"], prompt_name="query", normalize_embeddings=False)
np.savez(output, values=found)
