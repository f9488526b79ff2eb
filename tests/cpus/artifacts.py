"""The demo pair's artifacts, and such as embedport made before codes were limited in pairs."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.files import MANIFEST
from embedport.quantize.schemes import QuantScheme


def write_artifacts(folder: Path) -> None:
    """Each precision of both, int8 in both dialects, and int8 without the limit."""
    for precision in ("fp32", "int8", "int4"):
        embedport.export(builtin_embedder(), folder / f"embedding-{precision}", precision=precision)
        embedport.export(builtin_reranker(), folder / f"reranker-{precision}", precision=precision)
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
        mock.patch("embedport.exporters.onnx.formats.QuantScheme", unlimited),
        mock.patch("embedport.exporters.onnx.packing.check_pairs"),
    ):
        embedport.export(checkpoint, output, precision="int8", dialect=dialect)
    path = output / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["graph"]["limits_pairs"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
