"""sentence-transformers: python SCRIPT ARTIFACT INPUTS.json OUTPUT.npz BACKEND."""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

artifact, inputs, output, backend = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
if backend == "onnx":
    options = {"provider": "CPUExecutionProvider"}
else:  # on a CPU with bf16 OpenVINO would compute in it
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
if "pairs" in values:
    model = CrossEncoder(artifact, backend=backend, model_kwargs=options)
    results = model.predict([tuple(pair) for pair in values["pairs"]])
else:
    model = SentenceTransformer(artifact, backend=backend, model_kwargs=options)
    results = model.encode(values["texts"], prompt_name="query", normalize_embeddings=False)
np.savez(output, values=results)
