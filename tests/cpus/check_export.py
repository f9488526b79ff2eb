"""Export the demo pair: the graphs should be the same files, to the last byte, on every CPU.

    python check_export.py FOLDER

The first run writes their digests into FOLDER, later ones compare: run natively first. It needs
numpy, onnxruntime and what embedport itself needs. GPTQ and AWQ are not part of it: their moments
are sums in an order of the BLAS library's. Nor does it run what it exports, which changes no file
of the graph and takes most of the time: check_artifacts.py does. A line of JSON for each artifact:
its name, how many of its files differ, and 0.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reranker


def digests(output: Path, checkpoint: Path, precision: str, **options: Any) -> dict[str, str]:
    """Export, and digest the files of the graph."""
    embedport.export(checkpoint, output, precision=precision, **options)
    files = sorted((output / "onnx").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Each precision of both."""
    kept = Path(sys.argv[1], "digests.json")
    expected = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    found: dict[str, dict[str, str]] = {}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("fp32", {}),
        ("int8", {}),
        ("int4", {"fast": True}),
    )
    runs = ("verify_graph", "verify_continuation", "make_witness")
    unrun = mock.patch.multiple(
        "embedport.exporters.onnx.export", **dict.fromkeys(runs, mock.DEFAULT)
    )
    with TemporaryDirectory() as folder, unrun:
        for task, checkpoint in (
            ("embedding", builtin_embedder()),
            ("reranker", builtin_reranker()),
        ):
            for precision, options in cases:
                name = f"{task}-{precision}"
                files = digests(Path(folder, name), checkpoint, precision, **options)
                found[name] = files
                other = expected.get(name, files)
                differing = sum(files.get(file) != other.get(file) for file in files | other)
                record = {"name": name, "difference": differing, "limit": 0}
                sys.stdout.write(json.dumps(record) + "\n")
    if not expected:
        kept.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
