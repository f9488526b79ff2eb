"""The differences of TensorRT 10, TensorRT 11 and TensorRT for RTX that matter to embedport.

TensorRT 11 has only strongly typed networks: each tensor has its type in the graph. The flag that
requests this has no effect any more, nor have the builder's precision flags, which nothing here or
in build.py uses. Source: NVIDIA's migration guide, TensorRT 10 to 11, and NvInfer.h of 11.1.

TensorRT for RTX builds for compute capabilities and needs no GPU for it. It has neither version nor
hardware compatibility, and times no kernels. Source: its Python module, 1.7.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from ...errors import DeviceError, InputError
from ...machine.engine import LIBRARIES, Capability, Compatibility, Library, format_capability

# RMSNormalization and RotaryEmbedding came with TensorRT 10.15, Attention with 10.14
# (docs/Changelog.md of onnx-tensorrt). Of TensorRT for RTX, 1.7 is the oldest that was tried.
LOWEST: dict[Library, tuple[int, int]] = {"tensorrt": (10, 15), "tensorrt-rtx": (1, 7)}
# Engines are for these and later ones, unless compute capabilities are given.
LOWEST_CAPABILITY: Capability = (8, 0)
LOWEST_FP8_CAPABILITY: Capability = (8, 9)


def check_version(library: Library, version: str) -> None:
    """Refuse a version that is too old.

    Raises:
        DeviceError: The version lacks operators of the graph.
    """
    lowest = LOWEST[library]
    if tuple(int(part) for part in version.split(".")[:2]) < lowest:
        raise DeviceError(
            f"{LIBRARIES[library]} {version} is too old, RMSNormalization and Attention need "
            f"{lowest[0]}.{lowest[1]} or later"
        )


def network_flags(trt: ModuleType, library: Library) -> int:
    """The flags of `Builder.create_network` for a strongly typed network."""
    if library == "tensorrt" and int(trt.__version__.split(".")[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def set_compatibility(
    trt: ModuleType, config: Any, version_compatible: bool, hardware_compatible: Compatibility
) -> None:
    """Set where else an engine of TensorRT is loaded and runs."""
    if version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    level = trt.HardwareCompatibilityLevel
    config.hardware_compatibility_level = {
        "none": level.NONE,
        "ampere+": level.AMPERE_PLUS,
        "same-capability": level.SAME_COMPUTE_CAPABILITY,
    }[hardware_compatible]


def check_capabilities(trt: ModuleType, wanted: Iterable[Capability]) -> None:
    """Refuse compute capabilities that TensorRT for RTX does not build for.

    Raises:
        InputError: It does not build for one of them.
    """
    known = _capabilities(trt)
    for capability in wanted:
        if capability not in known:
            raise InputError(
                f"TensorRT for RTX {trt.__version__} builds for compute capability "
                f"{', '.join(map(format_capability, known))}, found {format_capability(capability)}"
            )


def set_capabilities(
    trt: ModuleType, config: Any, wanted: tuple[Capability, ...], has_fp8: bool
) -> tuple[Capability, ...]:
    """Set which GPUs an engine of TensorRT for RTX is built for.

    Args:
        trt: The module.
        config: The builder's configuration.
        wanted: The compute capabilities; empty for every one that can run the graph.
        has_fp8: Whether the graph has tensors in fp8.

    Returns:
        The compute capabilities that the engine runs on.
    """
    known = _capabilities(trt)
    if not wanted:
        # Without any set, the engine runs on all that the library supports from Ampere on.
        lowest = LOWEST_FP8_CAPABILITY if has_fp8 else LOWEST_CAPABILITY
        return tuple(capability for capability in known if capability >= lowest)
    targets = tuple(sorted(set(wanted)))
    config.num_compute_capabilities = len(targets)
    for i, capability in enumerate(targets):
        config.set_compute_capability(known[capability], i)
    return targets


def _capabilities(trt: ModuleType) -> dict[Capability, Any]:
    """Compute capability to the library's constant."""
    return {
        (int(name[2:-1]), int(name[-1])): member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }


def allow_decomposition(trt: ModuleType, network: Any) -> None:
    """Let attention without a fused kernel run as separate operators instead of failing the build.

    In fp32, for example, there is none. Python gets a layer's own class only if it is set.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
