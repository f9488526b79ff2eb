"""Where TensorRT 10 and 11 differ, and what of them embedport needs.

TensorRT 11 has no weakly typed networks: each tensor has the type that the graph gives it, the
flag that asks for that is gone from what has an effect, and so are the builder's flags that named
precisions. Nothing here or in build.py uses those. Source: NVIDIA's migration guide, TensorRT 10
to 11, and NvInfer.h of 11.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import DeviceError

if TYPE_CHECKING:
    import tensorrt as trt

    from ...engine import Compatibility

# RMSNormalization and RotaryEmbedding came with 10.15, Attention with 10.14
# (docs/Changelog.md of onnx-tensorrt).
LOWEST = (10, 15)


def check_version(version: str) -> None:
    """Refuse a TensorRT that is too old.

    Raises:
        DeviceError: It lacks operators of the graph.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < LOWEST:
        raise DeviceError(
            f"TensorRT {version} has no RMSNormalization: "
            f"{LOWEST[0]}.{LOWEST[1]} or later is needed"
        )


def network_flags(version: str) -> int:
    """What `Builder.create_network` takes for a strongly typed network."""
    import tensorrt as trt

    if int(version.split(".")[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def hardware_level(compatibility: Compatibility) -> trt.HardwareCompatibilityLevel:
    """TensorRT's name of where an engine runs."""
    import tensorrt as trt

    level = trt.HardwareCompatibilityLevel
    return {
        "none": level.NONE,
        "ampere+": level.AMPERE_PLUS,
        "same-capability": level.SAME_COMPUTE_CAPABILITY,
    }[compatibility]


def allow_decomposition(network: trt.INetworkDefinition) -> None:
    """Let attention that no fused kernel takes run as its parts, instead of failing the build.

    Fused kernels exist for the head sizes of the published models; smaller ones may have none.
    The stubs, of 10.13, know no attention; Python sees a layer's own class only when told.
    """
    import tensorrt as trt

    names: Any = trt
    for i in range(network.num_layers):
        layer: Any = network.get_layer(i)
        if layer.type == names.LayerType.ATTENTION_INPUT:
            layer.__class__ = names.IAttentionInputLayer
            layer.attention.decomposable = True
