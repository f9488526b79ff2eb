"""The number of threads that every runner is told to use."""

from __future__ import annotations

from ..runtimes.batching import core_limit, count_cores
from .peers import serving


def choose_threads() -> int:
    """Threads per runner: as `embedport.load` chooses here, at most one per physical core."""
    cores, physical = count_cores(), serving.count_physical_cores()
    return cores if physical is None else min(cores, physical)


def thread_variables() -> dict[str, str]:
    """Environment variables for a runner's process.

    `embedport.load` leaves the number of threads to onnxruntime, which starts and pins one per
    physical core. OMP_NUM_THREADS is set if `choose_threads` gives another number, or if the cores
    are limited in a way that onnxruntime does not see.
    """
    threads = choose_threads()
    if core_limit() is None and threads == serving.count_physical_cores():
        return {}
    return {"OMP_NUM_THREADS": str(threads)}
