"""The machine that a validation ran on, and whose code computed the artifact's results."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from ..artifact.witness import WITNESS, read_witness
from ..errors import MissingPackageError, require
from ..machine.cpu import read_cpu, read_memory
from ..runtimes import ModelInfo
from ..runtimes.batching import count_cores
from ..runtimes.onnxruntime import OnnxModel
from ..runtimes.ort_custom_ops import choose_kernels, register_kernels


@dataclass(frozen=True)
class Machine:
    """The machine that a validation ran on.

    Attributes:
        cpu: The processor's name.
        instructions: Its instruction sets that affect results.
        code: Whose code computed the artifact's results: embedport's kernels, onnxruntime's
            operators, TensorRT or torch.
        cores: Number of cores that the process may use.
        memory: Bytes of RAM; 0 if unknown.
        system: The operating system.
        python: Python's version.
        providers: onnxruntime's execution providers, the preferred one first; empty if onnxruntime
            is not installed.
    """

    cpu: str
    instructions: tuple[str, ...]
    code: str
    cores: int
    memory: int
    system: str
    python: str
    providers: tuple[str, ...]


def describe_machine(runtime: Any) -> Machine:
    """This machine.

    Args:
        runtime: The artifact's, or the checkpoint's, Embedder or Reranker.
    """
    try:
        ort = require("onnxruntime", "cpu")
    except MissingPackageError:  # not needed to run a checkpoint
        ort = None
    cpu = read_cpu()
    return Machine(
        cpu=cpu.name or "unknown",
        instructions=cpu.instructions,
        code=describe_code(runtime.info, runtime.device, runtime.model),
        cores=count_cores(),
        memory=read_memory(),
        system=_system(),
        python=platform.python_version(),
        providers=tuple(ort.get_available_providers()) if ort else (),
    )


def describe_code(info: ModelInfo, device: str, model: object) -> str:
    """Whose code computes a model's results.

    Args:
        info: The artifact, or the checkpoint.
        device: The device it runs on.
        model: What runs it.
    """
    has_functions = True  # as has the graph of a checkpoint's 4-bit codes
    if info.checkpoint is not None:
        if not isinstance(model, OnnxModel):
            return "torch"
    else:
        assert info.artifact is not None
        manifest = info.artifact.manifest
        if manifest.engine is not None and device != "cpu":
            return manifest.engine.builder
        assert manifest.graph is not None
        has_functions = manifest.graph.has_functions
    if device != "cpu" or not has_functions:
        return f"onnxruntime's operators on {device}"
    kernels = register_kernels(require("onnxruntime", "cpu").SessionOptions())
    if kernels is None:
        return f"onnxruntime's operators, without embedport's kernels: {choose_kernels()[1]}"
    return f"embedport's kernels for {kernels} and onnxruntime's operators"


def describe_export(info: ModelInfo) -> str:
    """The machine that exported an artifact, and whose code ran there; "" if it is not known."""
    if info.artifact is None or WITNESS not in info.artifact.manifest.files:
        return ""
    return str(read_witness(info.artifact.folder / WITNESS).machine)


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
