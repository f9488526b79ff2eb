"""Imports bitsandbytes without its kernel download, its warnings and torch's compiler."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Generator
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@contextlib.contextmanager
def importing_bitsandbytes() -> Generator[None]:
    """Stop bitsandbytes, on its first import, from downloading and running a kernel from the hub.

    It does so on CPUs with bf16 if the package `kernels` is installed, and warns if it cannot. Its
    logger is silenced because it warns at every 8-bit product that bf16 is rounded to fp16, which
    is part of the method. What it would compile stays as it is: optimizers, and operators for
    devices other than CPUs and NVIDIA's GPUs. To import the compiler takes seconds.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    present = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # ty: ignore[invalid-assignment]
    try:
        with _compiling_nothing():
            yield
    finally:
        if present is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = present


@contextlib.contextmanager
def _compiling_nothing() -> Generator[None]:
    """Make torch.compile give bitsandbytes its functions back, and compile all others."""
    if find_spec("torch") is None:
        yield
        return
    torch: Any = import_module("torch")
    compiled = torch.compile

    def compile_others(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] != "bitsandbytes":
            return compiled(model, **options)
        return model if model is not None else lambda function: function

    torch.compile = compile_others
    try:
        yield
    finally:
        torch.compile = compiled
