"""The kernels in C that stand in for the functions of a graph on a CPU.

A graph describes its functions (domain "embedport") in onnxruntime's own operators too, which run
where there are no kernels: no compiler when the package was built, or a CPU without AVX-512.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def register_kernels(options: Any) -> bool:
    """Have a session take the kernels, if they are there and the CPU has what they need.

    Args:
        options: onnxruntime.SessionOptions.

    Returns:
        Whether they are; the log says why not.
    """
    library = find_library()
    if library is None:
        logger.info("the package was built without kernels: onnxruntime's operators run instead")
        return False
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
        logger.info("the kernels do not run here (%s): onnxruntime's operators do", error)
        return False
    return True


def find_library() -> Path | None:
    """The kernels' library; None where the package was built without."""
    found = find_spec(f"{__package__}._kernels")
    return None if found is None or found.origin is None else Path(found.origin)
