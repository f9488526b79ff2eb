"""Load artifacts of the demo pair and compare what they give with what they gave natively.

    python check_artifacts.py FOLDER

The first run writes the vectors and scores into FOLDER, later ones compare: run natively first. It
needs numpy, onnxruntime and what embedport itself needs. A line of JSON for each artifact: its
name, one less the smallest cosine (or the largest difference of a score), and its limit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np

import embedport
from embedport.texts.samples import builtin_pairs, builtin_samples

TEXTS, PAIRS, LENGTH = 6, 2, 120
# Where there are no kernels sums are in another order, of which rounding to 8 bits makes more.
# Saturation shows as 0.004 of a cosine, and 0.5 of a score.
LIMITS = {
    "embedding-fp32": 1e-6,
    "embedding-int8": 5e-4,
    "embedding-int4": 5e-4,
    "reranker-fp32": 1e-4,
    "reranker-int8": 0.03,
    "reranker-int4": 0.03,
}


def run(folder: Path) -> np.ndarray:
    """Vectors [texts, dim], or scores [pairs]."""
    # Threads that wait in a loop take an emulated CPU from the one that works.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        model = embedport.load(folder, device="cpu")
    if isinstance(model, embedport.Reranker):
        pairs = [(pair.query, pair.document[:LENGTH]) for pair in builtin_pairs()[::6]]
        return model.score(pairs[:PAIRS])
    texts = [sample.text for sample in builtin_samples() if len(sample.text) < LENGTH]
    return model.encode(texts[:TEXTS])


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """See the module."""
    if expected.ndim == 1:
        return float(np.abs(found - expected).max())
    found, expected = (
        each / np.linalg.norm(each, axis=1, keepdims=True)
        for each in (found.astype(np.float64), expected.astype(np.float64))
    )
    return float(1 - (found * expected).sum(axis=1).min())


def main() -> None:
    """All artifacts of FOLDER/artifacts, named by task, precision, and what else they are."""
    for folder in sorted(Path(sys.argv[1], "artifacts").iterdir()):
        found, kept = run(folder), Path(sys.argv[1], f"{folder.name}.npy")
        if not kept.exists():
            np.save(kept, found)
        record = {
            "name": folder.name,
            "difference": difference(found, np.load(kept)),
            "limit": LIMITS["-".join(folder.name.split("-")[:2])],
        }
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
