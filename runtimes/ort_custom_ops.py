"""C kernels that replace a graph's functions (domain "embedport") on a CPU.

The graph also defines each function in onnxruntime's own operators. These run without the kernels:
if the package was built without a compiler, or the CPU has neither AVX2 nor NEON.
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

# For tests: "avx512", "avx2" or "neon" instead of the CPU's best instruction set, or "none".
VARIABLE = "EMBEDPORT_KERNELS"
NONE = "none"
# choose_kernels sets a global that the next registration reads: hold this lock over both.
_lock = threading.Lock()


def register_kernels(options: Any) -> str | None:
    """Make a session use the kernels, if they were built and the CPU supports them.

    Args:
        options: onnxruntime.SessionOptions.

    Returns:
        The kernels' instruction set, "avx512", "avx2" or "neon"; None if onnxruntime's operators
        run instead (the log says why).
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
                needed = name or "AVX2 with FMA, or NEON"
                logger.info("the CPU has no %s: onnxruntime's operators run instead", needed)
                return None
            options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
        logger.info("the kernels do not run here (%s): onnxruntime's operators do", error)
        return None
    return chosen.decode()


def find_library() -> Path | None:
    """The path of the kernels' library; None if the package was built without it."""
    spec = find_spec(f"{__package__}._kernels")
    return None if spec is None or spec.origin is None else Path(spec.origin)
