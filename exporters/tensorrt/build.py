"""Build an engine from a graph: parsed from its file, strongly typed, tuned for profiles."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DeviceError, MissingPackageError, VerificationError
from ...integrity import cache_folder
from ...machine.engine import Device, EngineRecord
from ...machine.gpu import current_device, tensorrt_version
from ..provenance import Progress
from .options import EngineOptions
from .versions import allow_decomposition, check_version, hardware_level, network_flags

if TYPE_CHECKING:
    import tensorrt as trt


def obstacle() -> str | None:
    """The reason why no engine can be built on this machine; None if one can."""
    try:
        check_version(tensorrt_version())
        current_device()
    except (DeviceError, MissingPackageError) as error:
        return str(error)
    return None


def build_engine(
    graph: Path,
    plan: Path,
    record: str,
    inputs: Sequence[str],
    options: EngineOptions,
    progress: Progress,
) -> EngineRecord:
    """Build an engine for this machine's GPU; `obstacle` must return None.

    Args:
        graph: An ONNX graph, with its external data beside it.
        plan: The engine's file, to be written.
        record: The engine's path in the artifact.
        inputs: Names of the graph's inputs, each [batch, sequence].
        options: How to build it.
        progress: Called with (phase, done, total) of TensorRT's own phases.

    Raises:
        DeviceError: There is no GPU.
        MissingPackageError: TensorRT or cuda-bindings is missing.
        VerificationError: TensorRT rejects the graph.
        BaseException: Raised by `progress`.
    """
    version, device = tensorrt_version(), current_device()
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(version))
    parser = trt.OnnxParser(network, logger)
    # parse_from_file finds the external data beside the graph.
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_name()}: {error.desc()}" for error in errors)
        raise VerificationError(f"{graph}: TensorRT {version} does not take the graph: {reasons}")
    allow_decomposition(network)
    config = builder.create_builder_config()
    # The graph keeps fp32 where it is needed: TF32's 10-bit mantissa would be too short.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = hardware_level(options.hardware_compatible)
    for profile in options.profiles:
        shapes = builder.create_optimization_profile()
        for name in inputs:
            shapes.set_shape(
                name, *(trt.Dims([*shape]) for shape in (profile.min, profile.opt, profile.max))
            )
        config.add_optimization_profile(shapes)
    timings = _timings_file(version, device)
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    relay = _Watch(progress)
    config.progress_monitor = monitor = _monitor(relay)
    serialized = builder.build_serialized_network(network, config)
    del monitor  # TensorRT holds no reference to it
    if relay.failure is not None:
        raise relay.failure
    if serialized is None:
        raise VerificationError(
            f"{graph}: TensorRT {version} could not build an engine on {device}; its log is above"
        )
    plan.parent.mkdir(exist_ok=True)
    with plan.open("wb") as file:
        file.write(serialized)
    # Without the timing cache the next build is only slower.
    with contextlib.suppress(OSError):
        timings.parent.mkdir(parents=True, exist_ok=True)
        timings.write_bytes(config.get_timing_cache().serialize())
    return EngineRecord(
        record,
        device,
        version,
        options.version_compatible,
        options.hardware_compatible,
        options.profiles,
    )


def _timings_file(version: str, device: Device) -> Path:
    """The file of the kernels' timings, for a TensorRT version and a device."""
    name = re.sub(r"\W+", "-", f"{device.name} {version}").lower()
    return cache_folder("tensorrt") / f"{name}.timings"


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


def _monitor(relay: _Watch) -> trt.IProgressMonitor:
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            relay.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return relay.step(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            relay.finish(phase_name)

    return Monitor()
