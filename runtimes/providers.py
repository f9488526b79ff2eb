"""onnxruntime's execution providers: their options, and which nodes fell back to the CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..artifact.folder import Artifact
from ..integrity import cache_folder

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# Makes the session record which provider runs which node.
RECORD_NODES = "session.record_ep_graph_assignment_info"
# Operators of shape and position arithmetic, which onnxruntime deliberately leaves on the CPU.
BOOKKEEPING = frozenset(
    {
        "Add",
        "ArgMax",
        "Cast",
        "Concat",
        "Constant",
        "Expand",
        "Gather",
        "Identity",
        "Max",
        "MemcpyFromHost",
        "MemcpyToHost",
        "Mod",
        "Mul",
        "Range",
        "ReduceSum",
        "Reshape",
        "Shape",
        "Slice",
        "Squeeze",
        "Sub",
        "Unsqueeze",
    }
)
# Name prefix of the nodes that compute positions, and their cosines and sines.
POSITIONS = "inputs/"


def list_providers(device: str, artifact: Artifact) -> list[tuple[str, dict[str, str]]]:
    """The providers for onnxruntime, with their options, in order of preference.

    Options: https://onnxruntime.ai/docs/execution-providers/, CUDA and TensorRT.

    Args:
        device: "cpu", "cuda" or "tensorrt".
        artifact: The artifact; its TensorRT engines are kept in the user's cache folder.
    """
    cpu: tuple[str, dict[str, str]] = (PROVIDERS["cpu"], {})
    if device == "cpu":
        return [cpu]
    cuda = {
        # The defaults grow memory in powers of two, and compute fp32 in TF32: 10 bits of mantissa.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }
    chosen: list[tuple[str, dict[str, str]]] = [(PROVIDERS["cuda"], cuda), cpu]
    if device == "tensorrt":
        chosen.insert(0, (PROVIDERS["tensorrt"], _tensorrt_options(artifact)))
    return chosen


def _tensorrt_options(artifact: Artifact) -> dict[str, str]:
    graph = artifact.manifest.graph
    assert graph is not None
    cache = str(engine_cache(artifact))
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
    }
    if graph.arithmetic != "fp32":
        options[f"trt_{graph.arithmetic}_enable"] = "1"
    return options


def engine_cache(artifact: Artifact) -> Path:
    """The cache folder for engines of this graph with these weights; created if missing.

    It is outside the artifact, which may be read-only and must stay as it was hashed.
    """
    graph = artifact.manifest.graph
    assert graph is not None
    graph_folder = graph.path.rpartition("/")[0]
    digest = hashlib.sha256()
    for name, record in sorted(artifact.manifest.files.items()):
        if name.startswith(f"{graph_folder}/"):
            digest.update(f"{name} {record.sha256}\n".encode())
    folder = cache_folder("engines") / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fallen_back(session: Any) -> list[str]:
    """Nodes that fell back to the CPU in a session on a GPU, as "name (operator)".

    Args:
        session: An InferenceSession, opened with RECORD_NODES.
    """
    return [
        f"{node.name} ({node.op_type})"
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == PROVIDERS["cpu"]
        for node in subgraph.get_nodes()
        if node.op_type not in BOOKKEEPING and not node.name.startswith(POSITIONS)
    ]
