"""Artifacts of the demo pair, held to reference.npz: numpy and onnxruntime are enough.

    python tests/vectors/compare.py [--kernels LIBRARY] ARTIFACT…

Each artifact is an export of the demo embedder or reranker in fp32, int8 or int4. Their graphs run
in a plain onnxruntime, row by row, with embedport's kernels if their library is given. So the
script runs where the package does not, as under an emulator of another CPU. Exit code 1: one is
beyond its limit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).parent / "reference.npz"
# Precision to the smallest cosine and to the largest difference of a score.
LIMITS = {"fp32": (0.9999999, 1e-6), "int8": (0.99999, 1e-3), "int4": (0.9999, 1e-3)}

# Multiples of these limits that are allowed where there are no kernels: onnxruntime's operators
# round otherwise (docs/runtimes.md).
WITHOUT_KERNELS = {
    ("embedding", "int8"): 10,
    ("embedding", "int4"): 2,
    ("reranker", "int8"): 20,
    ("reranker", "int4"): 20,
}


def allowed(task: str, precision: str, *, kernels: bool) -> int:
    """The most that `apart` may give.

    Args:
        task: "embedding" or "reranker".
        precision: "fp32", "int8" or "int4".
        kernels: Whether embedport's kernels ran.
    """
    return 1 if kernels else WITHOUT_KERNELS.get((task, precision), 1)


def read_rows(task: str) -> list[np.ndarray]:
    """The token ids of a task's rows, int64 [tokens] each."""
    with np.load(REFERENCE) as file:
        ids, lengths = file[f"{task}/input_ids"], file[f"{task}/lengths"]
    return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])


def apart(task: str, precision: str, found: np.ndarray, step: int = 1) -> float:
    """How far results are from the reference, as a part of the limit: above 1 is beyond it.

    Args:
        task: "embedding" or "reranker".
        precision: "fp32", "int8" or "int4".
        found: float32 [rows, dim] or [rows], those of every step-th row.
        step: 1 for all rows.
    """
    with np.load(REFERENCE) as file:
        expected = file[f"{task}/{precision}"][::step].astype(np.float64)
    min_cosine, max_difference = LIMITS[precision]
    if task == "reranker":
        return float(np.abs(found - expected).max() / max_difference)
    found = found.astype(np.float64)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float((1 - ((found * expected).sum(1) / lengths).min()) / (1 - min_cosine))


def run_plain(graph: Path, rows: list[np.ndarray], kernels: Path | None) -> np.ndarray:
    """A graph's results in a plain onnxruntime.

    Args:
        graph: The graph.
        rows: Token ids, int64 [tokens] each.
        kernels: The library of embedport's kernels, or None.

    Returns:
        float32 [rows, dim] or [rows].
    """
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait in a loop take an emulated CPU from the one that works.
    options.intra_op_num_threads = 1
    if kernels is not None:
        choose = ctypes.CDLL(str(kernels)).choose_kernels
        choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
        if choose(b"") is None:
            sys.exit(f"{kernels}: this CPU has no instruction set that it needs")
        options.register_custom_ops_library(str(kernels))
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return np.concatenate(
        [
            session.run(None, {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])})[
                0
            ]
            for ids in rows
        ]
    )


def main() -> None:
    """Compare the artifacts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=Path, help="the library of embedport's kernels")
    parser.add_argument("artifacts", type=Path, nargs="+")
    options = parser.parse_args()
    beyond = False
    for folder in options.artifacts:
        manifest = json.loads((folder / "embedport.json").read_text(encoding="utf-8"))
        task, precision = manifest["task"], manifest["precision"]
        found = run_plain(folder / manifest["graph"]["path"], read_rows(task), options.kernels)
        part = apart(task, precision, found)
        most = allowed(task, precision, kernels=options.kernels is not None)
        beyond |= not part <= most
        limit = f"{LIMITS[precision]}, at most {most}"
        print(f"{task} {precision}: {part:.4f} of the limit {limit}", flush=True)  # noqa: T201
    sys.exit(int(beyond))


if __name__ == "__main__":
    main()
