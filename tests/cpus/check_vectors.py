"""Hold the demo pair's artifacts to the reference vectors and scores in the repository.

    python check_vectors.py FOLDER

It needs numpy, onnxruntime and what embedport itself needs. A line of JSON for each artifact: its
name, and how far it is off as a part of its limit in tests/vectors/compare.py. Where there are no
kernels, onnxruntime's operators round otherwise, and limits are wider: docs/runtimes.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime

from embedport.runtimes.ort_custom_ops import find_library, register_kernels

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.vectors.compare import allowed, apart, read_rows, run_plain

# Every fifth of 16 rows: emulation is slow.
STEP = 5


def main() -> None:
    """All artifacts of FOLDER/artifacts that have reference vectors."""
    here = register_kernels(onnxruntime.SessionOptions())
    kernels = find_library() if here else None
    for task in ("embedding", "reranker"):
        for precision in ("fp32", "int8", "int4"):
            name = f"{task}-{precision}"
            graph = Path(sys.argv[1], "artifacts", name, "onnx", "model.onnx")
            found = run_plain(graph, read_rows(task)[::STEP], kernels)
            record = {
                "name": name,
                "difference": apart(task, precision, found, STEP),
                "limit": allowed(task, precision, kernels=kernels is not None),
            }
            sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
