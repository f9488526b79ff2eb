"""fastembed: python fastembed_.py ARTIFACT INPUTS.json OUTPUT.npz."""

import json
import sys
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

artifact, inputs, output = sys.argv[1:]
values = json.loads(Path(inputs).read_text(encoding="utf-8"))
width = json.loads(Path(artifact, "embedport.json").read_text(encoding="utf-8"))["embedding_dim"]
TextEmbedding.add_custom_model(
    model="artifact",
    pooling=PoolingType.DISABLED,
    normalization=False,
    sources=ModelSource(hf="artifact"),
    dim=width,
    model_file="onnx/model.onnx",
    output_name="sentence_embedding",
)
model = TextEmbedding("artifact", specific_model_path=artifact)
# fastembed has no prompts: they are part of a text.
vectors = list(model.embed([values["prompt"] + text for text in values["texts"]]))
np.savez(output, values=np.stack(vectors))
