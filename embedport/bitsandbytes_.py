"""bitsandbytes imported without what it would fetch, and without its remarks."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Generator


@contextlib.contextmanager
def importing_bitsandbytes() -> Generator[None]:
    """Keep bitsandbytes, on its first import, from fetching and running a kernel off the hub.

    It fetches one on CPUs with bf16 wherever the package `kernels` is installed, and warns where it
    cannot. Later it would warn of every 8-bit product of every batch that bf16 is rounded to fp16
    on the way, as the method does.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    present = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        if present is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = present
