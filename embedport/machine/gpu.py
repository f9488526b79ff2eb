"""Access to the GPU: the CUDA runtime through cuda-bindings, and the TensorRT libraries.

Why not torch: cuda-bindings is 20 MB instead of gigabytes, and has all that an engine needs
(memory, streams and CUDA graphs).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import DeviceError, MissingPackageError, require
from .engine import LIBRARIES, Device, Library

MODULES: dict[Library, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL: dict[Library, str] = {
    "tensorrt": "pip install tensorrt 'embedport[tensorrt]', on a machine with an NVIDIA GPU and a "
    "driver",
    "tensorrt-rtx": "pip install 'embedport[tensorrt-rtx]'",
}


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime, which returns (error, results…).

    Returns:
        The result; a tuple if there are several, None if there is none.

    Raises:
        DeviceError: The call failed.
        MissingPackageError: cuda-bindings is not installed.
    """
    cuda = require("cuda.bindings.runtime", "tensorrt")
    error, *results = getattr(cuda, function)(*arguments)
    if error != cuda.cudaError_t.cudaSuccess:
        raise DeviceError(f"CUDA: {function} failed with {error.name}")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None


def current_device() -> Device:
    """The GPU that CUDA uses.

    Raises:
        DeviceError: There is no GPU, or its driver is missing or too old.
        MissingPackageError: cuda-bindings is not installed.
    """
    try:
        call("cudaGetDeviceCount")
    except DeviceError as error:
        raise DeviceError(f"no GPU can be used here ({error})") from error
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    name = properties.name.decode().rstrip("\0")
    return Device(name, (properties.major, properties.minor))


def driver_version() -> str:
    """The newest CUDA version that the driver supports, such as "13.2".

    Raises:
        DeviceError: There is no driver.
        MissingPackageError: cuda-bindings is not installed.
    """
    version = int(call("cudaDriverGetVersion"))
    return f"{version // 1000}.{version % 1000 // 10}"


def load_tensorrt(library: Library) -> ModuleType:
    """The Python module of a TensorRT library.

    Raises:
        MissingPackageError: It is not installed (type stubs alone do not count), or one of its
            shared libraries does not load.
    """
    name = f"{LIBRARIES[library]} is not installed"
    try:
        module = importlib.import_module(MODULES[library])
        _ = module.__version__
    except (ModuleNotFoundError, AttributeError):
        raise MissingPackageError(f"{name}: {INSTALL[library]}") from None
    except (ImportError, OSError) as error:
        raise MissingPackageError(f"{name} completely ({error}): {INSTALL[library]}") from error
    return module


def tensorrt_version(library: Library) -> str:
    """The version of a TensorRT library, such as "11.1.0.106".

    Raises:
        MissingPackageError: It is not installed.
    """
    return load_tensorrt(library).__version__


def make_logger(trt: ModuleType, take: Callable[[str, bool], None]) -> Any:
    """A logger for a TensorRT library.

    Args:
        trt: The library's module.
        take: Called with each message, and whether it is an error.

    Returns:
        An `ILogger`.
    """
    errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            take(msg, severity in errors)

    return Logger()
