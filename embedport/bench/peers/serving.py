"""The serving loop and helpers that all runners share. Needs only numpy, not embedport.

A request is a line {"rows": FILE.npz, "batch_rows": N, "vectors": FILE.npy} on standard input; its
answer is a line {"seconds": S, "peak_bytes": B} on standard output.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

try:
    import resource
except ImportError:  # on Windows
    resource = None


def count_physical_cores(topology="/sys/devices/system/cpu"):
    """Physical cores of this machine; onnxruntime starts one thread for each. None if unknown."""
    names = ("physical_package_id", "core_id")
    try:
        cores = {
            tuple((folder / name).read_text() for name in names)
            for folder in Path(topology).glob("cpu[0-9]*/topology")
        }
    except OSError:
        return None
    return len(cores) or None


def session_threads(threads):
    """The value of the session option intra_op_num_threads for a number of threads.

    It is 0, onnxruntime's default, if that gives the same number and OMP_NUM_THREADS is not set:
    any explicit number turns off onnxruntime's pinning of threads to cores.
    """
    is_default = threads == count_physical_cores() and "OMP_NUM_THREADS" not in os.environ
    return 0 if is_default else threads


def threads_of(session):
    """The number of threads of an onnxruntime session."""
    return session.get_session_options().intra_op_num_threads or count_physical_cores()


def read_rows(path):
    """Read rows of token ids, int64 [tokens] each: "ids" concatenated, split at "ends"."""
    with np.load(path) as arrays:
        return np.split(arrays["ids"], arrays["ends"][:-1])


def pad(rows):
    """(input_ids, attention_mask), int64 [rows, longest], padded on the right."""
    mask = np.zeros((len(rows), max(map(len, rows))), np.int64)
    ids = np.zeros_like(mask)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def in_batches(rows, batch_rows, forward):
    """Run rows in batches of similar length, longest first; results are in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    vectors = [None] * len(rows)
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        for i, vector in zip(batch, forward([rows[i] for i in batch]), strict=True):
            vectors[i] = vector
    return np.stack(vectors)


def last_token(hidden, mask):
    """Unit vectors of the last real tokens, float32 [rows, width]."""
    states = hidden[np.arange(len(mask)), mask.sum(axis=1) - 1].astype(np.float32)
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def open_session(path, threads):
    """A session of onnxruntime with its default options, except for the threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = session_threads(int(threads))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_feeds(rows, input_names):
    """The inputs of a traced graph, which may ask for position_ids."""
    ids, mask = pad(rows)
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in input_names:
        feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return feeds


def serve_batches(forward, threads):
    """Like `serve`, with the batches formed here; forward: rows to vectors."""
    serve(lambda rows, batch_rows: in_batches(rows, batch_rows, forward), threads)


def serve(run, threads):
    """Answer requests until the input ends.

    run: (rows, batch_rows) to float32 vectors [rows, width] or scores [rows].
    threads: Number of threads that the library reports.
    """
    print(json.dumps({"threads": threads}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rows = read_rows(request["rows"])
        start = time.perf_counter()
        vectors = run(rows, request["batch_rows"])
        seconds = time.perf_counter() - start
        np.save(request["vectors"], vectors)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes():
    """The largest resident set of this process: macOS counts bytes, Linux KiB; 0 if unknown."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(prepare, serve, packages, modules):
    """Run a peer's script: prepare KIND SOURCE OUT, serve KIND FOLDER THREADS, or warm.

    warm imports `modules`, which is slow the first time, and prints the interpreter's path and the
    versions of `packages`.
    """
    verb, *arguments = sys.argv[1:]
    if verb != "warm":
        {"prepare": prepare, "serve": serve}[verb](*arguments)
        return
    for module in modules:
        importlib.import_module(module)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"python": sys.executable, "versions": versions}), flush=True)
