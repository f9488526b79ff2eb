"""Build an engine from a graph: parsed from its file, strongly typed, tuned for profiles."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

import onnx_ir as ir

from ...cached import read_cached, write_cached
from ...errors import DeviceError, MissingPackageError, VerificationError
from ...integrity import cache_folder
from ...machine.engine import LIBRARIES, Capability, Device, EngineRecord, Library
from ...machine.gpu import current_device, load_tensorrt, make_logger, tensorrt_version
from ..provenance import Progress
from .layers import (
    HEADER,
    claimed_products,
    compare_products,
    computed_products,
    count_products,
    read_layers,
)
from .options import EngineOptions
from .versions import (
    allow_decomposition,
    check_version,
    network_flags,
    set_capabilities,
    set_compatibility,
)

PROFILE_WARNING = "Profile k"


def obstacle(library: Library) -> str | None:
    """The reason why a library can build no engine on this machine; None if it can."""
    try:
        check_version(library, tensorrt_version(library))
        if library == "tensorrt":
            current_device()
    except (DeviceError, MissingPackageError) as error:
        return str(error)
    return None


def build_engine(
    library: Library,
    graph: Path,
    plan: Path,
    record: str,
    inputs: Sequence[str],
    options: EngineOptions,
    progress: Progress,
) -> EngineRecord:
    """Build an engine with a library; its `obstacle` must be None.

    Args:
        library: "tensorrt" for this machine's GPU, or "tensorrt-rtx" for others.
        graph: An ONNX graph, with its external data beside it.
        plan: The engine's file, to be written.
        record: The engine's path in the artifact.
        inputs: Names of the graph's inputs, each [batch, sequence].
        options: How to build it.
        progress: Called with (phase, done, total) of TensorRT's own phases.

    Raises:
        DeviceError: There is no GPU, and the library needs one.
        MissingPackageError: The library or cuda-bindings is missing.
        VerificationError: The library rejects the graph, or the engine would multiply in other
            types than the graph.
        BaseException: Raised by `progress` or by writing the file.
    """
    trt = load_tensorrt(library)
    version = f"{LIBRARIES[library]} {trt.__version__}"
    device = current_device() if library == "tensorrt" else None
    log = _Log()
    logger = make_logger(trt, log.take)
    builder = trt.Builder(logger)
    network = parse(trt, library, builder, logger, graph)
    log.errors.clear()  # notes of a parser that found a way
    model = ir.load(graph)
    config, capabilities = _configure(trt, library, builder, model, inputs, options)
    timings = None
    if device is not None:
        timings = _timings_file(trt.__version__, device)
        cache = config.create_timing_cache(read_cached(timings) or b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    relay = _Watch(progress)
    config.progress_monitor = monitor = _monitor(trt, relay)
    plan.parent.mkdir(exist_ok=True)
    with plan.open("wb") as file, _interrupts(relay):
        writer = _writer(trt, file, relay)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    del monitor, writer  # TensorRT holds no references to them
    if relay.failure is not None:
        raise relay.failure
    # TensorRT also logs errors of kernels that it then leaves out.
    if not built or (log.errors and library == "tensorrt-rtx"):
        # It says the same of each profile.
        reasons = "; ".join(dict.fromkeys(log.errors)) or "it gives no reason"
        raise VerificationError(f"{graph.name}: {version} could not build an engine: {reasons}")
    if timings is not None:
        write_cached(timings, config.get_timing_cache().serialize())
    return EngineRecord(
        record,
        device,
        trt.__version__,
        options.version_compatible,
        options.hardware_compatible,
        options.profiles,
        library,
        capabilities,
        _count_products(graph, model, log.layers, version),
    )


def parse(trt: ModuleType, library: Library, builder: Any, logger: Any, graph: Path) -> Any:
    """Read a graph as a strongly typed network.

    Args:
        trt: The library's module.
        library: Its name.
        builder: A `Builder`.
        logger: The builder's logger.
        graph: The ONNX file.

    Returns:
        An `INetworkDefinition`.

    Raises:
        VerificationError: The parser does not take the graph; names the nodes.
    """
    network = builder.create_network(network_flags(trt, library))
    parser = trt.OnnxParser(network, logger)
    # parse_from_file finds the external data beside the graph.
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = dict.fromkeys(map(_describe, errors))
        raise VerificationError(
            f"{graph.name}: {LIBRARIES[library]} {trt.__version__} does not take the graph: "
            f"{'; '.join(reasons)}"
        )
    allow_decomposition(trt, network)
    return network


def _configure(
    trt: ModuleType,
    library: Library,
    builder: Any,
    model: ir.Model,
    inputs: Sequence[str],
    options: EngineOptions,
) -> tuple[Any, tuple[Capability, ...]]:
    """The builder's configuration, and the compute capabilities that RTX engines run on."""
    config = builder.create_builder_config()
    # The graph keeps fp32 where it is needed: TF32's 10-bit mantissa would be too short.
    config.clear_flag(trt.BuilderFlag.TF32)
    # The builder logs the engine's layers; the engine itself does not change.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    capabilities = ()
    if library == "tensorrt":
        set_compatibility(trt, config, options.version_compatible, options.hardware_compatible)
    else:
        has_fp8 = any(
            value.dtype == ir.DataType.FLOAT8E4M3FN for value in model.graph.initializers.values()
        )
        capabilities = set_capabilities(trt, config, options.capabilities, has_fp8)
    for profile in options.profiles:
        shapes = builder.create_optimization_profile()
        for name in inputs:
            shapes.set_shape(
                name, *(trt.Dims([*shape]) for shape in (profile.min, profile.opt, profile.max))
            )
        config.add_optimization_profile(shapes)
    return config, capabilities


def _describe(error: Any) -> str:
    """A parser's error in words; the description alone may be as short as "false"."""
    kind = error.code().name.replace("_", " ").lower()
    return f"{error.node_name()} ({error.node_operator()}): {kind}: {error.desc()}"


def _count_products(graph: Path, model: ir.Model, layers: str, version: str) -> dict[str, int]:
    """Products by type; empty if the builder logged no layers.

    Raises:
        VerificationError: A product has another type than in the graph.
    """
    if not layers:
        return {}
    claimed, computed = claimed_products(model), computed_products(read_layers(layers))
    if different := compare_products(claimed, computed):
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise VerificationError(
            f"{graph.name}: {version} changes what is computed: {different[0]}{more}"
        )
    return count_products(claimed, computed)


def _timings_file(version: str, device: Device) -> Path:
    """The file of the kernels' timings, for a TensorRT version and a device."""
    name = re.sub(r"\W+", "-", f"{device.name} {version}").lower()
    return cache_folder("tensorrt") / f"{name}.timings"


@contextlib.contextmanager
def _interrupts(relay: _Watch) -> Generator[None]:
    """Let Ctrl-C stop the build by `relay`: raised in one of its callbacks it would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        relay.failure = relay.failure or KeyboardInterrupt()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass
class _Watch:
    """Passes the builder's reports on.

    Attributes:
        progress: The function to call.
        totals: Steps of each unfinished phase.
        failure: The exception that `progress` raised, such as Ctrl-C; it stops the build.
    """

    progress: Progress
    totals: dict[str, int] = field(default_factory=dict)
    failure: BaseException | None = None

    def start(self, phase: str, total: int) -> None:
        self.totals[phase] = total
        self._report(phase, 0)

    def step(self, phase: str, done: int) -> bool:
        self._report(phase, done)
        return self.failure is None

    def finish(self, phase: str) -> None:
        self._report(phase, self.totals[phase])
        del self.totals[phase]

    def _report(self, phase: str, done: int) -> None:
        if self.failure is not None:
            return
        # An exception must not propagate through TensorRT.
        try:
            self.progress(phase, done, self.totals[phase])
        except BaseException as error:
            self.failure = error


def _monitor(trt: ModuleType, relay: _Watch) -> Any:
    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            relay.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return relay.step(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            relay.finish(phase_name)

    return Monitor()


def _writer(trt: ModuleType, file: IO[bytes], relay: _Watch) -> Any:
    class Writer(trt.IStreamWriter):
        def write(self, data: bytes) -> int:
            # An exception must not propagate through TensorRT.
            try:
                return file.write(data)
            except OSError as error:
                relay.failure = relay.failure or error
                return 0

    return Writer()


@dataclass
class _Log:
    """Messages of a library.

    Attributes:
        errors: Errors, in order.
        layers: The engine's layers, in text; empty until it is built.
    """

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    def take(self, message: str, is_error: bool) -> None:
        # RTX warns of a profile that is beyond it, and gives an engine all the same.
        refused_profile = message.startswith(PROFILE_WARNING)
        # After an error, without a GPU, the library also says that it has no driver.
        if refused_profile or (is_error and "catchCudaError" not in message):
            self.errors.append(message)
        elif message.startswith(HEADER):
            self.layers = message
