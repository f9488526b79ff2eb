"""The demo pair's artifacts, and such as embedport made before codes were limited in pairs.

    uv run python tests/cpus/artifacts.py

says what the limit costs: int8 with and without it against fp32, on the built-in texts and pairs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.files import MANIFEST
from embedport.quantize.schemes import QuantScheme
from embedport.texts.samples import builtin_pairs, builtin_samples


def write_artifacts(folder: Path) -> None:
    """Each precision of both, int8 in both dialects, and int8 without the limit."""
    for precision in ("fp32", "int8", "int4"):
        options: dict[str, Any] = {"fast": True, "rotate": False} if precision == "int4" else {}
        for task, checkpoint in (
            ("embedding", builtin_embedder()),
            ("reranker", builtin_reranker()),
        ):
            output = folder / f"{task}-{precision}"
            embedport.export(checkpoint, output, precision=precision, **options)
    embedport.export(
        builtin_embedder(), folder / "embedding-int8-standard", precision="int8", dialect="standard"
    )
    for dialect in ("ort", "standard"):
        output = folder / f"embedding-int8-{dialect}-0.1"
        write_unlimited(builtin_embedder(), output, dialect=dialect)


def write_unlimited(checkpoint: Path, output: Path, *, dialect: str) -> None:
    """An int8 artifact whose codes are rounded to nearest, and whose manifest does not say."""

    def unlimited(*arguments: object, limits_pairs: bool = False, **options: object) -> QuantScheme:
        return QuantScheme(*arguments, **options)  # ty: ignore[invalid-argument-type]

    with (
        mock.patch("embedport.quantize.formats.QuantScheme", unlimited),
        mock.patch("embedport.exporters.graph.code_layouts.check_pairs"),
    ):
        embedport.export(checkpoint, output, precision="int8", dialect=dialect)
    path = output / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["graph"]["limits_pairs"]
    path.write_text(json.dumps(manifest), encoding="utf-8")


def measure(folder: Path) -> None:
    """Print what the limit costs."""
    for name, checkpoint in (("embedder", builtin_embedder()), ("reranker", builtin_reranker())):
        places = {kind: folder / f"{name}-{kind}" for kind in ("fp32", "int8", "unlimited")}
        for precision in ("fp32", "int8"):
            embedport.export(checkpoint, places[precision], precision=precision)
        write_unlimited(checkpoint, places["unlimited"], dialect="ort")
        found = {kind: _run(place) for kind, place in places.items()}
        for kind in ("unlimited", "int8"):
            if name == "embedder":
                cosines = (found[kind] * found["fp32"]).sum(axis=1)
                text = f"cosine at least {cosines.min():.5f}, mean {cosines.mean():.6f}"
            else:
                differences = np.abs(found[kind] - found["fp32"])
                text = f"score off by {differences.max():.4f}, mean {differences.mean():.5f}"
            sys.stdout.write(f"{name}, {kind}: {text}\n")


def _run(folder: Path) -> np.ndarray:
    model = embedport.load(folder, device="cpu")
    if isinstance(model, embedport.Reranker):
        return model.score([(pair.query, pair.document) for pair in builtin_pairs()])
    return model.encode([sample.text for sample in builtin_samples()]).astype(np.float64)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name))
