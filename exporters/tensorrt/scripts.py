"""Two small scripts that build and check an engine on its GPU, without embedport."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ...machine.engine import Compatibility, Profile
from .options import EngineOptions

LEVELS: dict[Compatibility, str] = {
    "none": "none",
    "ampere+": "ampere+",
    "same-capability": "sameComputeCapability",
}


def trtexec_script(graph: str, inputs: Sequence[str], options: EngineOptions) -> str:
    """A shell script that builds the engine with TensorRT's own trtexec, 10.15 or later.

    Args:
        graph: Path of the graph, from the script's folder.
        inputs: Names of the graph's inputs, each [batch, sequence].
        options: How to build it.
    """
    words = [
        f"--onnx={graph}",
        "--saveEngine=model.plan",
        # TensorRT 10 needs it; 11 is always strongly typed.
        "--stronglyTyped",
        "--noTF32",
        "--timingCacheFile=model.timings",
        f"--hardwareCompatibilityLevel={LEVELS[options.hardware_compatible]}",
        "--skipInference",
    ]
    if options.version_compatible:
        words.append("--versionCompatible")
    for i, profile in enumerate(options.profiles):
        words.append(f"--profile={i}")
        for kind in ("min", "opt", "max"):
            rows, tokens = getattr(profile, kind)
            shapes = ",".join(f"{name}:{rows}x{tokens}" for name in inputs)
            words.append(f"--{kind}Shapes={shapes}")
    command = " \\\n    ".join(["trtexec", *map(shlex.quote, words)])
    return f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\n{command}\n'


def polygraphy_script(
    graph: str,
    output: str,
    profiles: Sequence[Profile],
    *,
    min_cosine: float,
    max_difference: float,
) -> str:
    """A Python script that builds the engine with Polygraphy and compares it with check.npz.

    check.npz holds a batch and onnxruntime's output for it on a CPU, with each value rounded to
    its dtype in the graph.

    Args:
        graph: Path of the graph, from the script's folder.
        output: Name of the graph's output: vectors of unit length, or scores.
        profiles: The batches to tune for.
        min_cosine: The smallest allowed cosine of a vector to the expected one.
        max_difference: The largest allowed difference of a score to the expected one.
    """
    shapes = [(profile.min, profile.opt, profile.max) for profile in profiles]
    return f'''"""Builds the engine with Polygraphy and checks its numbers.

Needs a GPU, and: pip install tensorrt polygraphy numpy. With TensorRT for RTX instead, set
POLYGRAPHY_USE_TENSORRT_RTX=1.
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
from polygraphy import func
from polygraphy.backend.trt import (
    CreateConfig,
    EngineFromNetwork,
    NetworkFromOnnxPath,
    Profile,
    TrtRunner,
)

HERE = Path(__file__).parent
PROFILES = {shapes!r}
INPUTS = ("input_ids", "attention_mask")
MIN_COSINE, MAX_DIFFERENCE = {min_cosine}, {max_difference}

with np.load(HERE / "check.npz") as file:
    check = dict(file)
expected = check[{output!r}]
profiles = []
for shapes in PROFILES:
    profile = Profile()
    for name in INPUTS:
        profile.add(name, *shapes)
    profiles.append(profile)


@func.extend(NetworkFromOnnxPath(str(HERE / {graph!r}), strongly_typed=True))
def load_network(builder, network, parser):
    """Lets attention without a fused kernel run as separate operators."""
    trt = import_module(type(network).__module__)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


config = CreateConfig(profiles=profiles, tf32=False)
with TrtRunner(EngineFromNetwork(load_network, config)) as runner:
    found = runner.infer({{name: check[name] for name in INPUTS}})[{output!r}]
if expected.ndim == 2:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = ((found * expected).sum(axis=1) / lengths).min()
    print(f"smallest cosine {{cosine:.7f}}, at least {{MIN_COSINE}} wanted")
    sys.exit(not cosine >= MIN_COSINE)
difference = np.abs(found - expected).max()
print(f"largest difference {{difference:.2e}}, at most {{MAX_DIFFERENCE}} wanted")
sys.exit(not difference <= MAX_DIFFERENCE)
'''
