"""An artifact in sentence-transformers' ONNX backend, compared with our runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import embedport
from embedport.texts.samples import builtin_samples

from .checkpoint import checkpoint, scratch
from .machine import print_table, save
from .process import run, script

SCRIPT = Path(__file__).with_name("sentence_transformers_onnx.py")


def compare_backend() -> None:
    """Compare vectors of queries, with the artifact's own prompt, and of documents."""
    texts = [sample.text for sample in builtin_samples()]
    with scratch() as folder:
        embedport.export(checkpoint("0.6b"), folder / "hidden", outputs="hidden")
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        paths = [str(folder / name) for name in ("hidden", "texts.json", "vectors.npz")]
        run(script(SCRIPT, *paths))
        theirs = np.load(folder / "vectors.npz")
        embedder = embedport.load_embedder(folder / "hidden", device="cpu")
        figures = {}
        for prompt in ("query", "document"):
            ours = embedder.encode(texts, prompt=prompt)
            figures[prompt] = {
                "minimum_cosine": float((ours * theirs[prompt]).sum(axis=1).min()),
                "largest_difference": float(np.abs(ours - theirs[prompt]).max()),
            }
    print_table(
        ["sentence-transformers", "minimum cosine", "largest difference"],
        [[prompt, *row.values()] for prompt, row in figures.items()],
    )
    save("sentence-transformers-onnx", {"texts": len(texts), **figures})
