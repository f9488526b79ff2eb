"""A stand-in for a GPU: the CUDA runtime, and the half of TensorRT that needs a device.

It does what our code asks for and nothing else: "device" memory is the host's, a stream runs at
once or records, and an engine is the graph in onnxruntime. Parsing and building are TensorRT for
RTX's own, which needs no GPU for them.
"""

import ctypes
import enum
import itertools
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import embedport
from embedport.artifact.folder import write_manifest
from embedport.machine.engine import Device, Profile

PROFILES = ("1x1:2x8:4x64", "8x128:8x128:8x128")


class Cuda(ModuleType):
    """cuda.bindings.runtime.

    Attributes:
        device: Name and compute capability of the only GPU; None for no GPU.
        driver: The driver's CUDA version.
        launches: CUDA graphs that were launched.
        handles: What is there by its handle: "stream", or a graph's operations.
    """

    cudaError_t = enum.Enum("cudaError_t", {"cudaSuccess": 0, "cudaErrorNoDevice": 100})
    cudaMemcpyKind = enum.Enum(
        "cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"]
    )
    cudaStreamCaptureMode = enum.Enum("cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"])

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.device = ("Fake H100", (9, 0))
        self.driver = 13020
        self.launches = 0
        self.handles = {}
        self._numbers = itertools.count(7)
        self._memory = {}
        self._recording = None

    def submit(self, operation):
        """Run an operation on a stream, or record it during a capture."""
        if self._recording is None:
            operation()
        else:
            self._recording.append(operation)

    def _make(self, what):
        handle = next(self._numbers)
        self.handles[handle] = what
        return self._ok(handle)

    def _destroy(self, handle):
        del self.handles[handle]
        return self._ok()

    cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = _destroy

    def _ok(self, *results):
        return (self.cudaError_t.cudaSuccess, *results)

    def cudaGetDeviceCount(self):
        if self.device is None:
            return self.cudaError_t.cudaErrorNoDevice, 0
        return self._ok(1)

    def cudaDriverGetVersion(self):
        return self._ok(self.driver)

    def cudaGetDevice(self):
        return self._ok(0)

    def cudaGetDeviceProperties(self, number):
        name, (major, minor) = self.device
        return self._ok(SimpleNamespace(name=f"{name}\0\0".encode(), major=major, minor=minor))

    def cudaMalloc(self, size):
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self._memory[address] = memory
        return self._ok(address)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        del self._memory[address]
        return self._ok()

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert kind in self.cudaMemcpyKind
        self.submit(lambda: ctypes.memmove(target, source, size))
        return self._ok()

    def cudaStreamCreate(self):
        return self._make("stream")

    def cudaStreamSynchronize(self, stream):
        return self._ok()

    def cudaStreamBeginCapture(self, stream, mode):
        assert self._recording is None
        self._recording = []
        return self._ok()

    def cudaStreamEndCapture(self, stream):
        recorded, self._recording = self._recording, None
        return self._make(recorded)

    def cudaGraphInstantiate(self, graph, flags):
        return self._make(list(self.handles[graph]))

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for operation in self.handles[graph]:
            operation()
        return self._ok()


class TensorRT(ModuleType):
    """TensorRT for RTX, with another version and with a runtime that stands in for a GPU's.

    Attributes:
        profiles: The profiles of engines that are loaded.
        session: The graph in onnxruntime, which engines run.
        shapes: (profile, shape) of each run.
        contexts: The execution contexts that were made.
        takes_kept_kernels: Whether kernels of an earlier process are for this machine.
    """

    def __init__(self, real, version, cuda):
        super().__init__(real.__name__)
        self.__version__ = version
        self._real = real
        self.cuda = cuda
        self.profiles = []
        self.session = None
        self.shapes = []
        self.contexts = []
        self.takes_kept_kernels = True

    def __getattr__(self, name):
        return getattr(self._real, name)

    def Runtime(self, logger):
        return Runtime(self, logger)


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan):
        # How a plan of TensorRT for RTX begins.
        if bytes(plan[:4]) == b"vtrt":
            return Engine(self.trt)
        self.logger.log(self.trt.ILogger.Severity.ERROR, "the magic number is wrong")
        return None


class Engine:
    device_memory_size_v2 = 64

    def __init__(self, trt):
        self.trt = trt

    def create_runtime_config(self):
        return RuntimeConfig(self.trt)

    def create_execution_context(self, strategy):
        if isinstance(strategy, RuntimeConfig):
            assert strategy.cache is not None
            strategy.cache.compiled.add(f"context {len(self.trt.contexts)}")
        self.trt.contexts.append(strategy)
        return Context(self, strategy)


class RuntimeConfig:
    cuda_graph_strategy = None
    strategy = None
    cache = None

    def __init__(self, trt):
        self.trt = trt

    def create_runtime_cache(self):
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache):
        self.cache = cache

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class RuntimeCache:
    def __init__(self, trt):
        self.trt = trt
        self.compiled = set()

    def serialize(self):
        return "\n".join(sorted(self.compiled)).encode()

    def deserialize(self, data):
        if self.trt.takes_kept_kernels:
            self.compiled = set(data.decode().split("\n"))
        return self.trt.takes_kept_kernels


class Context:
    def __init__(self, engine, config):
        self.engine, self.cuda, self.config = engine, engine.trt.cuda, config
        self.profile, self.memory = None, None
        self.addresses, self.shapes = {}, {}

    def set_device_memory(self, address, size):
        self.memory = address, size

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        profile = self.engine.trt.profiles[self.profile]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(profile.min, shape, profile.max, strict=True))

    def execute_async_v3(self, stream):
        assert self.memory is not None
        shapes = dict(self.shapes)
        self.engine.trt.shapes.append((self.profile, shapes["input_ids"]))
        if isinstance(self.config, RuntimeConfig):
            self.config.cache.compiled.add(f"shape {shapes['input_ids']}")

        def run():
            feeds = {
                name: _array(self.addresses[name], np.int64, shape).copy()
                for name, shape in shapes.items()
            }
            (output,) = self.engine.trt.session.run(None, feeds)
            name = self.engine.trt.session.get_outputs()[0].name
            _array(self.addresses[name], np.float32, output.shape)[:] = output

        self.cuda.submit(run)
        return True


def _array(address, dtype, shape):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


@pytest.fixture
def cuda(monkeypatch):
    module = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    return module


@pytest.fixture(scope="session")
def rtx():
    """The module of TensorRT for RTX."""
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def tensorrt(monkeypatch, cuda, rtx):
    """A function (library, version) -> its module, on a machine with a GPU from now on."""

    def install(library="tensorrt", version=None):
        default = {"tensorrt": "11.1.0.106", "tensorrt-rtx": rtx.__version__}
        module = TensorRT(rtx, version or default[library], cuda)
        monkeypatch.setitem(sys.modules, library.replace("-", "_"), module)
        return module

    return install


@pytest.fixture(scope="session")
def graphs(tmp_path_factory, checkpoints):
    """A function (task) -> the artifact of a graph in fp32, standard dialect, cached."""
    made = {}

    def make(task="embedding"):
        if task not in made:
            folder = tmp_path_factory.mktemp(task) / "graph"
            made[task] = embedport.export(checkpoints("blocks", task), folder, dialect="standard")
        return made[task]

    return make


@pytest.fixture(scope="session")
def engines(tmp_path_factory, graphs, rtx):
    """A function (task) -> an artifact with an engine of TensorRT for RTX, cached."""
    made = {}

    def make(task="embedding"):
        if task not in made:
            folder = tmp_path_factory.mktemp(task) / "engine"
            made[task] = embedport.export_tensorrt(
                graphs(task).folder, folder, target="rtx", profiles=PROFILES
            )
        return made[task]

    return make


@pytest.fixture
def installed(engines, graphs, tensorrt, copied, cuda):
    """A function (library, task, profiles) -> (artifact with an engine of the library, library).

    For "tensorrt" the engine is said to have been built on the GPU that is there.
    """

    def make(library="tensorrt", task="embedding", profiles=("1x1:1x32:8x8192",), **record):
        trt = tensorrt(library)
        trt.session = onnxruntime.InferenceSession(graphs(task).graph)
        trt.profiles = [Profile.parse(text) for text in profiles]
        folder = copied(engines(task).folder)
        manifest = engines(task).manifest
        device = Device(*cuda.device)
        engine = replace(
            manifest.engine,
            library=library,
            device=device if library == "tensorrt" else None,
            capabilities=() if library == "tensorrt" else (device.capability,),
            tensorrt=trt.__version__,
            profiles=tuple(trt.profiles),
            **record,
        )
        write_manifest(folder, replace(manifest, engine=engine), folder.name)
        return embedport.Artifact.open(folder), trt

    return make


@pytest.fixture
def load():
    return embedport.load
