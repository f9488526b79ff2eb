"""An artifact in sentence-transformers' ONNX backend, compared with our runtime."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import embedport
from embedport.texts.samples import builtin_samples

from .checkpoint import checkpoint
from .machine import print_table, save
from .process import run, script

SCRIPT = Path(__file__).with_name("sentence_transformers_onnx.py")


def in_sentence_transformers() -> None:
    """Compare vectors of queries, with the artifact's own prompt, and of documents."""
    texts = [sample.text for sample in builtin_samples()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        embedport.export(checkpoint("0.6b"), folder / "hidden", outputs="hidden")
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        names = [str(folder / each) for each in ("hidden", "texts.json", "vectors.npz")]
        run(script(SCRIPT, *names))
        theirs = np.load(folder / "vectors.npz")
        embedder = embedport.load(folder / "hidden", device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        figures = {}
        for prompt in ("query", "document"):
            mine = embedder.encode(texts, prompt=prompt)
            figures[prompt] = {
                "minimum_cosine": float((mine * theirs[prompt]).sum(axis=1).min()),
                "largest_difference": float(np.abs(mine - theirs[prompt]).max()),
            }
    print_table(
        ["sentence-transformers", "minimum cosine", "largest difference"],
        [[prompt, *each.values()] for prompt, each in figures.items()],
    )
    save("sentence-transformers-onnx", {"texts": len(texts), **figures})
