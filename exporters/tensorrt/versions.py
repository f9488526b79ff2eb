"""The differences of TensorRT 10 and 11 that matter to embedport.

TensorRT 11 has only strongly typed networks: each tensor has its type in the graph. The flag that
requests this has no effect any more, nor have the builder's precision flags, which nothing here or
in build.py uses. Source: NVIDIA's migration guide, TensorRT 10 to 11, and NvInfer.h of 11.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import DeviceError

if TYPE_CHECKING:
    import tensorrt as trt

    from ...machine.engine import Compatibility

# RMSNormalization and RotaryEmbedding came with 10.15, Attention with 10.14
# (docs/Changelog.md of onnx-tensorrt).
LOWEST = (10, 15)


def check_version(version: str) -> None:
    """Refuse a TensorRT version that is too old.

    Raises:
        DeviceError: The version lacks operators of the graph.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < LOWEST:
        raise DeviceError(
            f"TensorRT {version} has no RMSNormalization: "
            f"{LOWEST[0]}.{LOWEST[1]} or later is needed"
        )


def network_flags(version: str) -> int:
    """The flags of `Builder.create_network` for a strongly typed network."""
    import tensorrt as trt

    if int(version.split(".")[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def hardware_level(compatibility: Compatibility) -> trt.HardwareCompatibilityLevel:
    """TensorRT's constant for a hardware compatibility."""
    import tensorrt as trt

    level = trt.HardwareCompatibilityLevel
    return {
        "none": level.NONE,
        "ampere+": level.AMPERE_PLUS,
        "same-capability": level.SAME_COMPUTE_CAPABILITY,
    }[compatibility]


def allow_decomposition(network: trt.INetworkDefinition) -> None:
    """Let attention without a fused kernel run as separate operators instead of failing the build.

    Fused kernels exist for the head sizes of the published models; smaller ones may have none.
    The type stubs, of 10.13, lack attention, and Python gets a layer's own class only if it is set.
    """
    import tensorrt as trt

    names: Any = trt
    for i in range(network.num_layers):
        layer: Any = network.get_layer(i)
        if layer.type == names.LayerType.ATTENTION_INPUT:
            layer.__class__ = names.IAttentionInputLayer
            layer.attention.decomposable = True
