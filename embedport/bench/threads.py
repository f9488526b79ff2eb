"""The number of threads that every side is told to work with."""

from __future__ import annotations

from ..runtimes.batching import core_limit, count_cores
from .peers import serving


def choose_threads() -> int:
    """Threads of each side: what `embedport.load` takes here, and no more than may run at once."""
    cores, physical = count_cores(), serving.count_physical_cores()
    return cores if physical is None else min(cores, physical)


def thread_variables() -> dict[str, str]:
    """Environment variables for a side's process.

    `embedport.load` leaves the number to onnxruntime, which takes a thread for each physical core
    and pins it there. Where that is another number than `choose_threads` gives, or where there is a
    limit that onnxruntime does not know of, OMP_NUM_THREADS says it.
    """
    threads = choose_threads()
    if core_limit() is None and threads == serving.count_physical_cores():
        return {}
    return {"OMP_NUM_THREADS": str(threads)}
