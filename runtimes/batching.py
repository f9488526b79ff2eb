"""Batches of rows of similar length, each within a budget of tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..attention import SHORT_ROW
from ..checks import check_integer
from ..errors import InputError
from ..progress import progress_bar

Key = TypeVar("Key", bound=Hashable)
# Batch tokens per CPU core. Half is as fast, within noise; double is slower (docs/benchmarks.md).
CORE_TOKENS = 256
# Enough to keep an H100 busy; more gains little and takes memory.
GPU_TOKENS = 16_384
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def choose_batch_tokens(wanted: int | None, device: str) -> int:
    """The token budget of a batch: `wanted`, or by default enough to keep the device busy.

    Args:
        wanted: The caller's budget; None for the device's default.
        device: "cpu", "cuda" or "tensorrt".
    """
    if wanted is not None:
        return wanted
    return CORE_TOKENS * count_cores() if device == "cpu" else GPU_TOKENS


def count_cores() -> int:
    """Number of cores this process may use: its CPU affinity, within `core_limit`."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    limit = core_limit()
    return cores if limit is None else min(cores, limit)


def core_limit() -> int | None:
    """The limit on cores from OMP_NUM_THREADS and the container's quota; None without either."""
    limits = []
    # OpenMP takes a number for each level of nesting: the first is that of an ordinary loop.
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal() and int(threads) > 0:
        limits.append(int(threads))
    if (quota := read_quota()) is not None:
        limits.append(max(1, math.ceil(quota)))
    return min(limits, default=None)


def limit_threads(options: Any) -> None:
    """Keep an onnxruntime session to this process's cores.

    By itself onnxruntime reads neither `core_limit` nor the CPU affinity of a cpuset or `taskset`:
    it starts a thread for each of the machine's cores, and prints an error for each core that it
    may not pin one to.

    Args:
        options: onnxruntime.SessionOptions.
    """
    cores = count_cores()
    if core_limit() is not None or cores < (os.cpu_count() or cores):
        options.intra_op_num_threads = cores


def read_quota() -> float | None:
    """The container's CPU quota in cores (cgroup v2); None without a limit."""
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def make_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows so that a batch's rows times its longest row stays within the budget.

    Short and long rows (`SHORT_ROW`) are never in the same batch, so a text's result does not
    depend on its batch.

    Args:
        lengths: Tokens of each row.
        batch_tokens: The budget, padding included; a row above it is a batch by itself.

    Returns:
        Batches of row numbers, longest rows first, so that memory peaks at the start.

    Raises:
        InputError: The budget is no positive integer.
    """
    check_integer("batch_tokens", batch_tokens)
    if batch_tokens < 1:
        raise InputError(f"batch_tokens should be at least 1, found {batch_tokens}")
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = len(batches) > 0 and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and (longest <= SHORT_ROW) == (lengths[row] <= SHORT_ROW):
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


def group_indices(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Each key's positions in `keys`, in order; keys in order of first appearance."""
    indices: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return indices


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad rows.

    Returns:
        (input_ids, attention_mask), both int64 [rows, longest]; padding has id 0 and mask 0.
    """
    size = max(len(row) for row in rows)
    input_ids = np.zeros((len(rows), size), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
    return input_ids, attention_mask


def run_batches(
    model: Callable[..., np.ndarray],
    rows: Sequence[np.ndarray],
    width: tuple[int, ...],
    *,
    batch_tokens: int,
    description: str,
    progress: bool | Callable[[int], None],
) -> np.ndarray:
    """Run rows through a model in batches.

    Args:
        model: Maps (input_ids, attention_mask), int64 [batch, size], to float32 [batch, *width].
        rows: Token ids, int64 [tokens] each.
        width: Shape of one row's result.
        batch_tokens: The budget of a batch.
        description: The progress bar's label.
        progress: Whether to show the bar, or a function to call with the number of rows just done.

    Returns:
        float32 [rows, *width] in the order of `rows`.
    """
    results = np.empty((len(rows), *width), np.float32)
    with progress_bar(description, len(rows), enabled=progress) as advance:
        for batch in make_batches([len(row) for row in rows], batch_tokens):
            results[batch] = model(*pad([rows[i] for i in batch]))
            advance(len(batch))
    return results
