"""Run the products that `products.py` wrote: they should equal exact arithmetic to the last bit.

    python check_products.py FOLDER

Each runs in onnxruntime's operators, and in the kernels where they are built and go with the CPU. A
line of JSON for each: its name, how far off it is, and how far it may be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from embedport.runtimes.ort_custom_ops import register_kernels

# onnxruntime's kernels for a single row, for a few and for many are not the same ones.
ROWS = (1, 2, 3, 7, 33)
# As `runtimes.exact` has it: KleidiAI rounds activations by the token, not by the group.
NO_KLEIDIAI = "mlas.disable_kleidiai"


def largest_difference(
    graph: bytes, x: np.ndarray, expected: np.ndarray, *, kernels: bool
) -> float:
    """From what is expected, in batches of several sizes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(NO_KLEIDIAI, "1")
    if kernels:
        register_kernels(options)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    differences = [0.0]
    for count in ROWS:
        (found,) = session.run(None, {"x": x[:, :count]})
        differences.append(np.abs(found - expected[:, :count]).max())
    return float(max(differences))


def main() -> None:
    """All files of FOLDER/products."""
    for path in sorted(Path(sys.argv[1], "products").glob("*.npz")):
        case = np.load(path)
        graph, x, expected = case["graph"].tobytes(), case["x"], case["expected"]
        for kernels in (False, True):
            difference = largest_difference(graph, x, expected, kernels=kernels)
            name = f"{path.stem}{', kernels' if kernels else ''}"
            record = {"name": name, "difference": difference, "limit": 0}
            sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
