"""Run the products that `products.py` wrote: they should equal exact arithmetic to the last bit.

    python check_products.py FOLDER

Each runs in the kernels where they are built and go with the CPU, and in onnxruntime's operators;
int8 of the standard dialect in OpenVINO too, where it is installed. A line of JSON for each: its
name, how far off it is, and how far it may be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime

from embedport.runtimes.ort_custom_ops import choose_kernels, register_kernels

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

    def run(rows: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"x": rows})[0])

    return _largest(run, x, expected)


def in_openvino(graph: bytes, x: np.ndarray, expected: np.ndarray) -> float:
    """The same in OpenVINO, with all else in fp32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(graph, b"")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _largest(lambda rows: compiled([rows])[0], x, expected)


def _largest(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, expected: np.ndarray) -> float:
    differences = [0.0]
    for count in ROWS:
        differences.append(np.abs(run(x[:, :count]) - expected[:, :count]).max())
    return float(max(differences))


def _write(name: str, difference: float) -> None:
    sys.stdout.write(json.dumps({"name": name, "difference": difference, "limit": 0}) + "\n")


def main() -> None:
    """All files of FOLDER/products."""
    chosen, _ = choose_kernels()
    for path in sorted(Path(sys.argv[1], "products").glob("*.npz")):
        case = np.load(path)
        graph, x, expected = case["graph"].tobytes(), case["x"], case["expected"]
        difference = largest_difference(graph, x, expected, kernels=True)
        _write(f"{path.stem}, {f'kernels for {chosen}' if chosen else 'no kernels'}", difference)
        _write(path.stem, largest_difference(graph, x, expected, kernels=False))
        of_openvino = path.stem.startswith("int8 ") and path.stem.endswith("standard fp32")
        if of_openvino and find_spec("openvino") is not None:
            _write(f"{path.stem}, OpenVINO", in_openvino(graph, x, expected))


if __name__ == "__main__":
    main()
