"""The kernels in C that stand in for the functions of a graph on a CPU.

A graph describes its functions (domain "embedport") in onnxruntime's own operators too, which run
where there are no kernels: no compiler when the package was built, or a CPU with neither AVX2 nor
NEON.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# "avx512", "avx2" or "neon" instead of the best that the CPU has, or "none"; for tests.
VARIABLE = "EMBEDPORT_KERNELS"
NONE = "none"
# The library takes its choice for the next registration.
_lock = threading.Lock()


def register_kernels(options: Any) -> str | None:
    """Make a session use the kernels, if they are there and the CPU has what they need.

    Args:
        options: onnxruntime.SessionOptions.

    Returns:
        Their instruction set, "avx512", "avx2" or "neon"; None where onnxruntime's operators run
        instead, and the log says why.
    """
    name = os.environ.get(VARIABLE, "")
    if name == NONE:
        return None
    library = find_library()
    if library is None:
        logger.info("the package was built without kernels: onnxruntime's operators run instead")
        return None
    try:
        with _lock:
            choose = ctypes.CDLL(str(library)).choose_kernels
            choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
            chosen = choose(name.encode())
            if chosen is None:
                wanted = name or "AVX2 with FMA, or NEON"
                logger.info("the CPU has no %s: onnxruntime's operators run instead", wanted)
                return None
            options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
        logger.info("the kernels do not run here (%s): onnxruntime's operators do", error)
        return None
    return chosen.decode()


def find_library() -> Path | None:
    """The kernels' library; None where the package was built without."""
    found = find_spec(f"{__package__}._kernels")
    return None if found is None or found.origin is None else Path(found.origin)
