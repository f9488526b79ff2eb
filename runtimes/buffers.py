"""A tensor's memory in two places, pinned on the host and on the device, and copies between them.

Pinned memory is what the device copies from by itself, while the host goes on.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np

from ..errors import require
from ..gpu import call

FREE = {"cudaMalloc": "cudaFree", "cudaMallocHost": "cudaFreeHost"}


class Buffer:
    """Memory for arrays of one dtype, freed with the object.

    Args:
        dtype: Of the arrays.
        values: How many the largest of them has.

    Attributes:
        device: Address on the device.
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
        """An array in the pinned memory, from its start."""
        return self._array[: math.prod(shape)].reshape(shape)

    def upload(self, shape: tuple[int, ...], stream: int) -> None:
        """Copy an array's values to the device when the stream gets there."""
        self._copy(self.device, self._host, shape, self._kinds.cudaMemcpyHostToDevice, stream)

    def download(self, shape: tuple[int, ...], stream: int) -> None:
        """Copy an array's values from the device when the stream gets there."""
        self._copy(self._host, self.device, shape, self._kinds.cudaMemcpyDeviceToHost, stream)

    def _copy(
        self, target: int, source: int, shape: tuple[int, ...], kind: object, stream: int
    ) -> None:
        size = math.prod(shape) * self._dtype.itemsize
        call("cudaMemcpyAsync", target, source, size, kind, stream)


def allocate(owner: object, function: str, size: int) -> int:
    """Memory that is freed with an object.

    Args:
        owner: The object.
        function: "cudaMalloc" or "cudaMallocHost".
        size: Bytes.

    Returns:
        Its address.

    Raises:
        DeviceError: There is not so much.
    """
    address = int(call(function, size))
    finalizer = weakref.finalize(owner, call, FREE[function], address)
    # At the end of the process CUDA may be gone, and all memory goes anyway.
    finalizer.atexit = False
    return address
