"""The TensorRT backend: an artifact's engine on a GPU that it was built for.

Memory, streams and CUDA graphs come from cuda-bindings, not from torch: see embedport.machine.gpu.
An engine of TensorRT for RTX is compiled to device code here: its kernels are kept in the user's
cache folder, and it makes its own CUDA graphs, since kernels for a shape replace more general ones
later.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact.folder import Artifact
from ..errors import ArtifactError, DeviceError, InputError, require
from ..machine.engine import EngineRecord, choose_profile
from ..machine.gpu import call, current_device, load_tensorrt, make_logger
from .buffers import Buffer, allocate, free_with
from .kernel_cache import KernelCache

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

# Sequences are padded to a multiple of this: kernels run faster, and shapes repeat more often.
ALIGNMENT = 8
# A shape seen this often gets a CUDA graph: one launch instead of one per kernel.
REPEATS = 3
# Each CUDA graph has its own execution context, which takes host memory.
MAX_GRAPHS = 32


@dataclass(frozen=True)
class _Captured:
    """A shape's own context, and the CUDA graph that uses it; None if it cannot be captured."""

    context: trt.IExecutionContext
    graph: Any


class TensorRTModel:
    """An engine: token ids in, vectors or scores out. One batch runs at a time.

    Args:
        artifact: An artifact with an engine. A version-compatible engine contains code that runs
            here: load it only from a source that you trust to run code.

    Attributes:
        device: "cuda".
        precision: The precision, as in the manifest.

    Raises:
        DeviceError: There is no GPU, or the engine was built for another GPU or TensorRT.
        MissingPackageError: The engine's library or cuda-bindings is missing.
        ArtifactError: The library does not load the engine.
    """

    device = "cuda"

    def __init__(self, artifact: Artifact) -> None:
        manifest = artifact.manifest
        assert manifest.engine is not None
        assert manifest.graph is not None
        self._record = manifest.engine
        self.precision = manifest.precision
        self._lock = threading.Lock()
        self._errors: list[str] = []
        self._trt, self._engine = load_engine(
            artifact.folder / self._record.path, self._record, self._errors
        )
        self._kernels = None
        if self._record.library == "tensorrt-rtx":
            sha256 = manifest.files[self._record.path].sha256
            self._kernels = KernelCache(self._trt, self._engine, sha256)
        self._stream = int(call("cudaStreamCreate"))
        free_with(self, "cudaStreamDestroy", self._stream)
        # Batches run one at a time, so all contexts share one scratch buffer.
        self._scratch_size = self._engine.device_memory_size_v2
        self._scratch = allocate(self, "cudaMalloc", max(1, self._scratch_size))
        rows = max(profile.max[0] for profile in self._record.profiles)
        tokens = max(profile.max[0] * profile.max[1] for profile in self._record.profiles)
        self._width = () if manifest.embedding_dim is None else (manifest.embedding_dim,)
        self._inputs = {name: Buffer(np.int64, tokens) for name in manifest.graph.inputs}
        self._output_name = manifest.graph.outputs[0]
        self._output = Buffer(np.float32, rows * (manifest.embedding_dim or 1))
        self._contexts = {i: self._make_context(i) for i in range(len(self._record.profiles))}
        self._seen: Counter[tuple[int, tuple[int, int]]] = Counter()
        self._graphs: dict[tuple[int, tuple[int, int]], _Captured] = {}

    def __call__(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, prompt_length: int = 0
    ) -> np.ndarray:
        """Run a batch: see `Model`.

        It runs in parts if it has more rows than the engine takes at once. `prompt_length` is not
        used: models that do not pool their prompts get no engine.

        Raises:
            InputError: The texts are longer than the engine takes.
            DeviceError: The GPU failed.
        """
        rows, tokens = input_ids.shape
        fitting = [profile.max[0] for profile in self._record.profiles if profile.max[1] >= tokens]
        if not fitting:
            longest = max(profile.max[1] for profile in self._record.profiles)
            raise InputError(
                f"a text of {tokens:,} tokens is longer than the {longest:,} that the engine was "
                "built for; build it with a larger `profiles`, or load it with a smaller "
                "`max_length`"
            )
        step = max(fitting)
        with self._lock:
            parts = [
                self._run(input_ids[i : i + step], attention_mask[i : i + step])
                for i in range(0, rows, step)
            ]
        return np.concatenate(parts)

    def _run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        rows, tokens = input_ids.shape
        number = choose_profile(self._record.profiles, rows, tokens)
        profile = self._record.profiles[number]
        aligned = min(-(-tokens // ALIGNMENT) * ALIGNMENT, profile.max[1])
        shape = profile.padded(rows, aligned)
        for array, buffer in zip((input_ids, attention_mask), self._inputs.values(), strict=True):
            padded = buffer.host(shape)
            padded[:] = 0
            padded[:rows, :tokens] = array
        self._execute(number, shape)
        call("cudaStreamSynchronize", self._stream)
        if self._kernels is not None:
            self._kernels.count_batch()
        return self._output.host((shape[0], *self._width))[:rows].copy()

    def _execute(self, number: int, shape: tuple[int, int]) -> None:
        """Put a batch on the stream, as a CUDA graph if its shape repeats."""
        if self._kernels is not None:
            self._enqueue(self._contexts[number], shape)
            return
        key = (number, shape)
        if key in self._graphs:
            captured = self._graphs[key]
            if captured.graph is None:
                self._enqueue(captured.context, shape)
            else:
                call("cudaGraphLaunch", captured.graph, self._stream)
            return
        self._seen[key] += 1
        if self._seen[key] < REPEATS or len(self._graphs) >= MAX_GRAPHS:
            self._enqueue(self._contexts[number], shape)
        else:
            self._graphs[key] = self._capture(number, shape)

    def _capture(self, number: int, shape: tuple[int, int]) -> _Captured:
        """Run a batch, and capture a CUDA graph for further batches of its shape."""
        # A graph depends on its context's state, so this context runs no other shape.
        context = self._make_context(number)
        # TensorRT sets up a shape in its first run, which must not be captured.
        self._enqueue(context, shape)
        mode = require("cuda.bindings.runtime", "tensorrt").cudaStreamCaptureMode
        call("cudaStreamBeginCapture", self._stream, mode.cudaStreamCaptureModeThreadLocal)
        try:
            self._enqueue(context, shape)
        except DeviceError:
            log.warning("TensorRT cannot capture %s x %s tokens in a CUDA graph", *shape)
            with contextlib.suppress(DeviceError):
                call("cudaGraphDestroy", call("cudaStreamEndCapture", self._stream))
            return _Captured(context, None)
        template = call("cudaStreamEndCapture", self._stream)
        try:
            graph = call("cudaGraphInstantiate", template, 0)
        finally:
            call("cudaGraphDestroy", template)
        free_with(self, "cudaGraphExecDestroy", graph)
        return _Captured(context, graph)

    def _enqueue(self, context: trt.IExecutionContext, shape: tuple[int, int]) -> None:
        for name, buffer in self._inputs.items():
            if not context.set_input_shape(name, shape):
                raise DeviceError(f"TensorRT does not take {name} of {shape[0]} x {shape[1]}")
            buffer.upload(shape, self._stream)
        if not context.execute_async_v3(self._stream):
            raise DeviceError(f"TensorRT could not run a batch{_reasons(self._errors)}")
        self._output.download((shape[0], *self._width), self._stream)

    def _make_context(self, profile: int) -> trt.IExecutionContext:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            strategy if self._kernels is None else self._kernels.configure(strategy)
        )
        if context is None:
            raise DeviceError(
                f"TensorRT could not make an execution context{_reasons(self._errors)}"
            )
        context.set_device_memory(self._scratch, self._scratch_size)
        context.set_optimization_profile_async(profile, self._stream)
        for name, buffer in (*self._inputs.items(), (self._output_name, self._output)):
            context.set_tensor_address(name, buffer.device)
        return context


def load_engine(path: Path, record: EngineRecord, errors: list[str]) -> tuple[ModuleType, Any]:
    """Load an engine on this machine's GPU.

    Args:
        path: The engine's file.
        record: What is known of it.
        errors: Takes the library's error messages, now and later.

    Returns:
        The module of its library, and an `ICudaEngine`.

    Raises:
        DeviceError: There is no GPU, or the engine is not for it.
        MissingPackageError: Its library or cuda-bindings is missing.
        ArtifactError: The library does not take it.
    """
    trt = load_tensorrt(record.library)
    try:
        record.check(current_device(), trt.__version__)
    except DeviceError as error:
        raise DeviceError(f"{path}: {error}; use device='cpu', which runs the graph") from error
    logger = make_logger(
        trt, lambda message, is_error: errors.append(message) if is_error else None
    )
    runtime = trt.Runtime(logger)
    # A version-compatible engine contains its own runtime as code.
    runtime.engine_host_code_allowed = record.version_compatible
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ArtifactError(
            f"{path}: {record.builder} does not take the engine{_reasons(errors)}. Build it again: "
            "embedport export tensorrt ARTIFACT -o OUT"
        )
    return trt, engine


def _reasons(errors: list[str]) -> str:
    return "".join(f"; {error}" for error in errors)
