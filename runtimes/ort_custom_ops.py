"""C kernels that replace a graph's functions (domain "embedport") on a CPU.

The graph also defines each function in onnxruntime's own operators. These run without the kernels:
if the package was built without a compiler, or the CPU has neither AVX2 nor NEON.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import InputError

logger = logging.getLogger(__name__)

# An instruction set instead of the CPU's best, or "none": for tests and measurements.
VARIABLE = "EMBEDPORT_KERNELS"
NONE = "none"
CHOICES = ("avx512", "avx2", "neon", NONE)
# As setup.py names it; the second one on Windows.
LIBRARY = ("_kernels.so", "_kernels.dll")
NOT_BUILT = "embedport was built without a C compiler (install gcc or clang, then embedport again)"
# choose_kernels sets a global that the next registration reads: hold this lock over both.
_lock = threading.Lock()


def register_kernels(options: Any) -> str | None:
    """Make a session use the kernels, if they were built and the CPU supports them.

    Args:
        options: onnxruntime.SessionOptions.

    Returns:
        The kernels' instruction set, "avx512", "avx2" or "neon"; None if onnxruntime's operators
        run instead (the log says why).

    Raises:
        InputError: $EMBEDPORT_KERNELS has an unknown value, or names kernels that do not run here.
    """
    with _lock:
        name, reason = _choose()
        if name is not None:
            try:
                options.register_custom_ops_library(str(find_library()))
            except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
                name, reason = _without(f"onnxruntime does not take the kernels ({error})")
    if name is None:
        logger.info("%s: onnxruntime's operators run instead", reason)
    return name


def choose_kernels() -> tuple[str | None, str]:
    """Which kernels run on this machine; needs no onnxruntime.

    Returns:
        (The instruction set, "avx512", "avx2" or "neon", and ""; or None and the reason).

    Raises:
        InputError: $EMBEDPORT_KERNELS has an unknown value, or names kernels that do not run here.
    """
    with _lock:
        return _choose()


def _choose() -> tuple[str | None, str]:
    name = os.environ.get(VARIABLE, "")
    if name and name not in CHOICES:
        raise InputError(f"${VARIABLE} should be one of {', '.join(CHOICES)}, found {name!r}")
    if name == NONE:
        return None, f"{VARIABLE} is {NONE}"
    library = find_library()
    if library is None:
        return _without(NOT_BUILT)
    try:
        choose = ctypes.CDLL(str(library)).choose_kernels
    except (OSError, AttributeError) as error:
        return _without(f"the kernels cannot be loaded ({error})")
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    chosen = choose(name.encode())
    if chosen is None:
        return _without(f"the CPU has no {name or 'AVX2 with FMA, or NEON'}")
    return chosen.decode(), ""


def _without(reason: str) -> tuple[None, str]:
    """No kernels, and why; an error if the user has named some."""
    if name := os.environ.get(VARIABLE):
        raise InputError(f"${VARIABLE} is {name}, and {reason}: unset it, or set it to {NONE}")
    return None, reason


def find_library() -> Path | None:
    """The path of the kernels' library; None if the package was built without it."""
    paths = [Path(__file__).with_name(name) for name in LIBRARY]
    return next(filter(Path.is_file, paths), None)
