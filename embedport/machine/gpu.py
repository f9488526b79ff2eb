"""Access to the GPU: the CUDA runtime through cuda-bindings, and TensorRT's version.

Why not torch: cuda-bindings is 20 MB instead of gigabytes, and has all that an engine needs
(memory, streams and CUDA graphs).
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import DeviceError, MissingPackageError, require
from .engine import Device

INSTALL = "pip install tensorrt 'embedport[tensorrt]', on a machine with an NVIDIA GPU and a driver"


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


def tensorrt_version() -> str:
    """TensorRT's version, "11.1.0.106".

    Raises:
        MissingPackageError: It is not installed; its type stubs alone do not count.
    """
    try:
        return importlib.import_module("tensorrt").__version__
    except (ModuleNotFoundError, AttributeError):
        raise MissingPackageError(f"tensorrt is not installed: {INSTALL}") from None
