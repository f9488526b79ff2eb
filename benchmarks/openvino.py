"""The standard dialect's graphs in OpenVINO: what its vectors are to the fp32 graph's."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import CACHE
from .machine import RESULTS, print_table, save
from .process import peer

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4/32": {"precision": "int4", "group_size": 32, "algorithm": "gptq"},
}


def runs_the_standard_dialect(results: Path = RESULTS) -> None:
    """Minimum cosine to the fp32 graph in onnxruntime, in both runtimes, on the built-in texts."""
    import embedport
    from embedport.demo.pipeline import builtin_embedder
    from embedport.demo.samples import builtin_samples

    texts = [sample.text for sample in builtin_samples()]
    CACHE.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        expected = np.empty(0)
        for name, options in PRECISIONS.items():
            out = folder / name.replace("/", "-")
            embedport.export(builtin_embedder(), out, dialect="standard", **options)
            embedder = embedport.load(out, device="cpu")
            assert isinstance(embedder, embedport.Embedder)
            assert embedder.artifact is not None
            vectors = embedder.encode(texts)
            expected = expected if len(expected) else vectors
            rows = embedder.tokenizer.encode(texts).ids
            np.savez(folder / "rows.npz", *rows)
            command = peer(
                "openvino_int8.py",
                "vectors",
                str(embedder.artifact.graph),
                str(folder / "rows.npz"),
                str(folder / "vectors.npy"),
            )
            versions = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            figures[name] = {
                runtime: float((found * expected).sum(axis=1).min())
                for runtime, found in (
                    ("onnxruntime", vectors),
                    ("openvino", np.load(folder / "vectors.npy")),
                )
            }
    print_table(
        ["standard dialect, minimum cosine", "onnxruntime", "openvino"],
        [[name, *each.values()] for name, each in figures.items()],
    )
    save("openvino-standard", {"peer": versions, "texts": len(texts), **figures}, results)
