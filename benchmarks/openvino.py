"""Graphs of the standard dialect in OpenVINO: cosines with the fp32 graph's vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import scratch
from .machine import RESULTS, print_table, save

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4/32": {"precision": "int4", "group_size": 32, "algorithm": "gptq"},
}


def compare_openvino(results: Path = RESULTS) -> None:
    """Smallest cosine with onnxruntime's fp32 vectors, in both runtimes, on the built-in texts."""
    import openvino

    import embedport
    from embedport.demo.pipeline import builtin_embedder
    from embedport.texts.samples import builtin_samples

    texts = [sample.text for sample in builtin_samples()]
    figures: dict[str, dict[str, float]] = {}
    with scratch() as folder:
        expected = np.empty(0)
        for name, options in PRECISIONS.items():
            out = folder / name.replace("/", "-")
            embedport.export(builtin_embedder(), out, dialect="standard", **options)
            embedder = embedport.load_embedder(out, device="cpu")
            assert embedder.artifact is not None
            vectors = embedder.encode(texts)
            expected = expected if len(expected) else vectors
            model = openvino.Core().compile_model(
                str(embedder.artifact.graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
            rows = [ids[None] for ids in embedder.tokenizer.encode(texts).ids]
            openvino_vectors = [
                model({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0] for ids in rows
            ]
            figures[name] = {
                "onnxruntime": float((vectors * expected).sum(axis=1).min()),
                "openvino": float((np.stack(openvino_vectors) * expected).sum(axis=1).min()),
            }
    print_table(
        ["standard dialect, minimum cosine", "onnxruntime", "openvino"],
        [[name, *row.values()] for name, row in figures.items()],
    )
    versions = {"openvino": openvino.__version__}
    save("openvino-standard", {"peer": versions, "texts": len(texts), **figures}, results)
