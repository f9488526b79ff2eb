"""What every side of a race does alike. Needs numpy, and nothing of embedport.

A request is a line {"rows": FILE.npz, "batch_rows": N, "vectors": FILE.npy} on standard input; its
answer is a line {"seconds": S, "peak_bytes": B} on standard output.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np


def count_threads():
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def read_rows(path):
    """Token ids, int64 [tokens] each: "ids" one behind the other, cut where "ends" says."""
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
    """Rows of like length together, the longest first; their vectors in the rows' own order."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    vectors = [None] * len(rows)
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        for i, vector in zip(batch, forward([rows[i] for i in batch]), strict=True):
            vectors[i] = vector
    return np.stack(vectors)


def last_token(hidden, mask):
    """Unit vectors of the last real tokens, float32 [rows, width]."""
    found = hidden[np.arange(len(mask)), mask.sum(axis=1) - 1].astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def serve(run, threads):
    """Answer requests until the input ends.

    run: (rows, batch_rows) to float32 [rows, width], the vectors, or [rows], the scores.
    threads: What it works with.
    """
    print(json.dumps({"threads": threads}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rows = read_rows(request["rows"])
        start = time.perf_counter()
        vectors = run(rows, request["batch_rows"])
        seconds = time.perf_counter() - start
        np.save(request["vectors"], vectors)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def report(packages):
    """Print which interpreter this is, and the versions of what a peer runs on."""
    from importlib.metadata import version

    versions = {name: version(name) for name in packages}
    print(json.dumps({"python": sys.executable, "versions": versions}), flush=True)
