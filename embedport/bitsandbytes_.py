"""Imports bitsandbytes without its kernel download and without its warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Generator


@contextlib.contextmanager
def importing_bitsandbytes() -> Generator[None]:
    """Stop bitsandbytes, on its first import, from downloading and running a kernel from the hub.

    It does so on CPUs with bf16 if the package `kernels` is installed, and warns if it cannot. Its
    logger is silenced because it warns at every 8-bit product that bf16 is rounded to fp16, which
    is part of the method.
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
