"""The kernels that TensorRT for RTX compiles where an engine runs, kept between processes."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cached import read_cached, write_cached
from ..integrity import cache_folder
from ..machine.gpu import current_device, driver_version

log = logging.getLogger(__name__)


class KernelCache:
    """The kernels that TensorRT for RTX compiles here, kept in a file for the next process.

    Args:
        trt: The library's module.
        engine: The engine.
        sha256: The engine's hash.

    Raises:
        DeviceError: There is no GPU.
    """

    def __init__(self, trt: ModuleType, engine: Any, sha256: str) -> None:
        self._path = path = _kernels_file(sha256, trt.__version__)
        self._batches = 0
        self._config = engine.create_runtime_config()
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self._config.create_runtime_cache()
        self._kept = read_cached(path)
        # The library checks that the kernels are for this device, driver and version.
        if self._kept is not None and not self._cache.deserialize(self._kept):
            log.info("%s is not for this machine: its kernels are compiled again", path)
        self._config.set_runtime_cache(self._cache)

    def configure(self, strategy: Any) -> Any:
        """The configuration of an execution context with an allocation strategy."""
        self._config.set_execution_context_allocation_strategy(strategy)
        return self._config

    def count_batch(self) -> None:
        """Keep the kernels, after the first, second, fourth, eighth, … batch.

        New shapes have new kernels, some of which are compiled while the batches go on.
        """
        self._batches += 1
        if self._batches & (self._batches - 1):
            return
        serialized = self._cache.serialize()
        kernels = b"" if serialized is None else memoryview(serialized)
        if kernels and kernels != self._kept:
            write_cached(self._path, kernels)
            self._kept = bytes(kernels)


def _kernels_file(sha256: str, version: str) -> Path:
    """The file of an engine's kernels, for this device, driver and version of the library."""
    machine = f"{current_device()} {driver_version()} {version}"
    name = re.sub(r"\W+", "-", machine).lower()
    return cache_folder("tensorrt-rtx") / f"{sha256[:32]}-{name}.kernels"
