"""A thin stand-in for TensorRT and the CUDA runtime, so that their adapter runs on a CPU.

It does what our code asks for and nothing else: "device" memory is the host's, a stream runs at
once or records, and an engine is the graph in onnxruntime. What TensorRT itself would say to a
call is not in here.
"""

import ctypes
import enum
import itertools
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import embedport


class Cuda(ModuleType):
    """cuda.bindings.runtime.

    Attributes:
        device: Name and compute capability of the only GPU; None for no GPU.
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


class Layer:
    """A layer of a network: `type`, until code gives it its own class."""

    def __init__(self, kind, attention):
        self.type = kind
        self._attention = attention


class IAttentionInputLayer(Layer):
    @property
    def attention(self):
        return self._attention


class IProgressMonitor:
    def __init__(self):
        pass


class TensorRT(ModuleType):
    """tensorrt.

    Attributes:
        built: What the last build was asked for.
        parse_error: What the parser finds wrong, or None.
        fails: Whether the builder gives nothing.
        shapes: (profile, shape) of each run.
        contexts: How many were made.
        session: The graph in onnxruntime, which engines run.
    """

    class Logger:
        ERROR = 1

        def __init__(self, severity):
            pass

    # The flags that TensorRT 11 still has.
    BuilderFlag = enum.Enum("BuilderFlag", ["TF32", "VERSION_COMPATIBLE"])
    LayerType = enum.Enum("LayerType", ["ATTENTION_INPUT", "SHUFFLE"])
    HardwareCompatibilityLevel = enum.Enum(
        "HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
    )
    ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", ["USER_MANAGED"]
    )
    IAttentionInputLayer = IAttentionInputLayer
    IProgressMonitor = IProgressMonitor
    Dims = tuple

    def __init__(self, version, cuda):
        super().__init__("tensorrt")
        self.__version__ = version
        self.cuda = cuda
        flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        if version.startswith("11"):
            flags = {"STRONGLY_TYPED": 0}
        self.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", flags)
        self.built = None
        self.parse_error = None
        self.fails = False
        self.shapes = []
        self.contexts = 0
        self.session = None

    def Builder(self, logger):
        return Builder(self)

    def OnnxParser(self, network, logger):
        return Parser(self, network)

    def Runtime(self, logger):
        return Runtime(self)


class Builder:
    def __init__(self, trt):
        self.trt = trt

    def create_network(self, flags):
        kinds = self.trt.LayerType
        layers = [
            Layer(kinds.SHUFFLE, None),
            Layer(kinds.ATTENTION_INPUT, SimpleNamespace(decomposable=False)),
        ]
        return SimpleNamespace(
            flags=flags, layers=layers, num_layers=len(layers), get_layer=layers.__getitem__
        )

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        shapes = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three})
        )

    def build_serialized_network(self, network, config):
        self.trt.built = SimpleNamespace(network=network, config=config)
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 1)
        going = monitor.step_complete("Timing", 0)
        monitor.phase_finish("Timing")
        going = going and monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        if self.trt.fails or not going:
            return None
        profiles = [each.shapes["input_ids"] for each in config.profiles]
        return json.dumps({"graph": network.path, "profiles": profiles}).encode()


class Config:
    hardware_compatibility_level = None
    progress_monitor = None

    def __init__(self):
        self.cleared, self.flags, self.profiles = [], [], []
        self.given = None
        self.clear_flag, self.set_flag = self.cleared.append, self.flags.append
        self.add_optimization_profile = self.profiles.append

    def create_timing_cache(self, data):
        self.given = data
        return data

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: b"how long it took")


class Parser:
    def __init__(self, trt, network):
        self.trt, self.network = trt, network
        self.num_errors = 1

    def parse_from_file(self, path):
        self.network.path = path
        return self.trt.parse_error is None

    def get_error(self, index):
        node, text = self.trt.parse_error
        return SimpleNamespace(node_name=lambda: node, desc=lambda: text)


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt):
        self.trt = trt

    def deserialize_cuda_engine(self, plan):
        data = bytes(plan)
        return Engine(self.trt, json.loads(data)) if data.startswith(b"{") else None


class Engine:
    device_memory_size_v2 = 64

    def __init__(self, trt, facts):
        self.trt = trt
        self.profiles = facts["profiles"]

    def create_execution_context(self, strategy):
        self.trt.contexts += 1
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.cuda = engine, engine.trt.cuda
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
        low, _, high = self.engine.profiles[self.profile]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def execute_async_v3(self, stream):
        assert self.memory is not None
        shapes = dict(self.shapes)
        self.engine.trt.shapes.append((self.profile, shapes["input_ids"]))

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


@pytest.fixture
def tensorrt(monkeypatch, cuda):
    """A function (version) -> the module `tensorrt` of that version from now on."""

    def install(version="11.1.0.106"):
        module = TensorRT(version, cuda)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
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


@pytest.fixture
def build(graphs, tensorrt, tmp_path):
    """A function (task, version, **options) -> (artifact with an engine, tensorrt)."""

    def make(task="embedding", version="11.1.0.106", **options):
        trt = tensorrt(version)
        trt.session = onnxruntime.InferenceSession(graphs(task).graph)
        artifact = embedport.export(
            graphs(task).folder, tmp_path / "engine", format="tensorrt", **options
        )
        return artifact, trt

    return make


@pytest.fixture
def attention_layers():
    """A function (network) -> its attention layers."""
    return lambda network: [
        each for each in network.layers if isinstance(each, IAttentionInputLayer)
    ]


@pytest.fixture
def load():
    return embedport.load
