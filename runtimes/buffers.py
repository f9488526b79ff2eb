"""Buffers in pinned host memory and in device memory, with copies between the two.

The device copies from pinned memory by itself, while the host goes on.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from ..errors import require
from ..machine.gpu import call

FREE = {"cudaMalloc": "cudaFree", "cudaMallocHost": "cudaFreeHost"}


class Buffer:
    """Memory for arrays of one dtype, freed with the object.

    Args:
        dtype: The arrays' dtype.
        values: Number of values in the largest array.

    Attributes:
        device: Its address on the device.
    """

    def __init__(self, dtype: type[np.generic], values: int) -> None:
        self._dtype = np.dtype(dtype)
        size = values * self._dtype.itemsize
        self.device = allocate(self, "cudaMalloc", size)
        self._host = allocate(self, "cudaMallocHost", size)
        memory = (ctypes.c_byte * size).from_address(self._host)
        self._array = np.ctypeslib.as_array(memory).view(self._dtype)
        self._kinds = require("cuda.bindings.runtime", "tensorrt").cudaMemcpyKind

    def host(self, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the pinned memory, from its start, as an array."""
        return self._array[: math.prod(shape)].reshape(shape)

    def upload(self, shape: tuple[int, ...], stream: int) -> None:
        """Queue a copy of an array's values to the device on the stream."""
        self._copy(self.device, self._host, shape, self._kinds.cudaMemcpyHostToDevice, stream)

    def download(self, shape: tuple[int, ...], stream: int) -> None:
        """Queue a copy of an array's values from the device on the stream."""
        self._copy(self._host, self.device, shape, self._kinds.cudaMemcpyDeviceToHost, stream)

    def _copy(
        self, target: int, source: int, shape: tuple[int, ...], kind: object, stream: int
    ) -> None:
        size = math.prod(shape) * self._dtype.itemsize
        call("cudaMemcpyAsync", target, source, size, kind, stream)


def allocate(owner: object, function: str, size: int) -> int:
    """Allocate memory that is freed together with an object.

    Args:
        owner: The object.
        function: "cudaMalloc" or "cudaMallocHost".
        size: Number of bytes.

    Returns:
        The memory's address.

    Raises:
        DeviceError: There is not enough memory.
    """
    address = int(call(function, size))
    free_with(owner, FREE[function], address)
    return address


def free_with(owner: object, function: str, handle: Any) -> None:
    """Free a CUDA handle by `function` when its owner is freed; the newest handle goes first."""
    finalizer = weakref.finalize(owner, call, function, handle)
    # Not at process exit: CUDA may be shut down already, and everything is freed anyway.
    finalizer.atexit = False
