"""Batches: rows of like length together, none larger than a budget of tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..attention import SHORT_ROW
from ..errors import InputError
from ..progress import progress_bar

# Half as much is as fast within the noise, twice as much is slower (docs/benchmarks.md).
CORE_TOKENS = 256
# Enough to keep an H100 busy; more gains little there and takes its memory.
GPU_TOKENS = 16_384
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def choose_batch_tokens(wanted: int | None, device: str) -> int:
    """The budget of a batch, in tokens: the one wanted, or what keeps the device busy.

    Args:
        wanted: None for the device's.
        device: "cpu", "cuda" or "tensorrt".
    """
    if wanted is not None:
        return wanted
    return CORE_TOKENS * count_cores() if device == "cpu" else GPU_TOKENS


def count_cores() -> int:
    """Cores that this process may use: those that it may run on, within its limit."""
    there = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if there else os.cpu_count() or 1
    limit = core_limit()
    return cores if limit is None else min(cores, limit)


def core_limit() -> int | None:
    """What OMP_NUM_THREADS and the container's quota leave of the cores; None where neither is."""
    limits = []
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        limits.append(int(threads))
    if (quota := read_quota()) is not None:
        limits.append(max(1, math.ceil(quota)))
    return min(limits, default=None)


def read_quota() -> float | None:
    """Processor time that a container may take, in cores (cgroup v2); None where it may all."""
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def make_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows so that rows times the longest of them stays within the budget.

    Short rows and long ones (`SHORT_ROW`) do not share a batch, so that a text's result is the same
    in any.

    Args:
        lengths: Tokens of each row.
        batch_tokens: The budget, padding counted; a longer row is a batch by itself.

    Returns:
        Batches of row numbers, the longest rows first, so that memory peaks at the start.

    Raises:
        InputError: The budget is not positive.
    """
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


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad rows.

    Returns:
        (input_ids, attention_mask), both int64 [rows, longest]; padding is id 0, mask 0.
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
        model: (input_ids, attention_mask), int64 [batch, size], to float32 [batch, *width].
        rows: Token ids, int64 [tokens] each.
        width: Shape of one row's result.
        batch_tokens: The budget of a batch.
        description: What the progress bar says.
        progress: Whether to show it, or what to call with the number of rows just done.

    Returns:
        float32 [rows, *width] in the order of `rows`.
    """
    results = np.empty((len(rows), *width), np.float32)
    with progress_bar(description, len(rows), enabled=progress) as advance:
        for batch in make_batches([len(row) for row in rows], batch_tokens):
            results[batch] = model(*pad([rows[i] for i in batch]))
            advance(len(batch))
    return results
