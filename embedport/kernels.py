"""bitsandbytes imported without what it would fetch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator


@contextlib.contextmanager
def without_fetched_kernels() -> Generator[None]:
    """Keep bitsandbytes, on its first import, from fetching and running a kernel off the hub.

    It does so on CPUs with bf16 wherever the package `kernels` is installed.
    """
    present = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        if present is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = present
