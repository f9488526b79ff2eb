"""Tensors that are not rounded to few bits: norms, biases, and the Dense modules' in the folder.

An artifact keeps them as they were, or with factors that its recipe tells of. In 4 bits the limits
on vectors have room for a norm without its gains, and a graph that pools has its own Dense modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..checkpoint.lora import open_floats
from ..checkpoint.pipeline import Outputs
from ..checkpoint.pooling import read_dense
from ..checkpoint.spec import ModelSpec
from ..errors import CheckpointError
from ..quantize.recipe import SCALINGS
from ..runtimes import ModelInfo
from ..runtimes.info import FLOATS
from .report import Gate
from .table import FLOAT_LIMIT, graph_paths

# Name to values, float32: a vector, or a Dense matrix's products [out, DIRECTIONS].
Tensors = Mapping[str, np.ndarray]

GATE = "tensors that differ"
DIRECTIONS = 8
# Tensors that the gate names.
NAMED = 5


def read_tensors(spec: ModelSpec) -> Tensors:
    """Read a reference's tensors, with its adapter if it has one."""
    names = [name for name, shape in spec.tensor_shapes().items() if len(shape) == 1]
    weights = open_floats(spec, names)
    vectors = {name: weights.read_fp32(name) for name in names}
    return vectors | dict(_dense_tensors(spec.outputs, spec.source.pipeline))


def tensors_gate(info: ModelInfo, expected: Tensors | None) -> Gate:
    """No tensor is farther from the reference's than rounding to 16 bits explains.

    Those that the recipe's transformations change, or that another tool's may, are left out.

    Args:
        info: The artifact, or the checkpoint.
        expected: The reference's; None if they are not known.
    """
    if expected is None:
        reason = "this recorded reference has no such tensors: record it again"
        return Gate(GATE, None, "≤", 0, basis=f"not checked: {reason}")
    kept = _find_kept(info)
    wrong = []
    for place, read in _readers(info):
        for name in filter(kept, expected):
            found = read(name)
            if found is not None and (error := _error(found, expected[name])) is not None:
                wrong.append(f"{place}: {name}: {error}")
    # A checkpoint of another tool may name its modules otherwise, and runs them itself.
    outputs = info.outputs if info.artifact is not None else Outputs()
    try:
        for name, found in _dense_tensors(outputs, info.folder):
            if (error := _error(found, expected.get(name, np.empty(0)))) is not None:
                wrong.append(f"{name}: {error}")
    except CheckpointError as error:
        wrong.append(str(error))
    rest = f"; and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
    return Gate(GATE, len(wrong), "≤", 0, "; ".join(wrong[:NAMED]) + rest)


def _dense_tensors(outputs: Outputs, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The Dense modules' tensors, as sentence-transformers reads them of the folder."""
    for dense in outputs.dense:
        for name, tensor in vars(read_dense(folder, dense)).items():
            if tensor is not None:
                yield f"{dense.path}/{name}", tensor if tensor.ndim == 1 else _products(tensor)


def _products(matrix: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(0)
    return matrix @ generator.standard_normal((matrix.shape[1], DIRECTIONS), np.float32)


def _find_kept(info: ModelInfo) -> Callable[[str], bool]:
    """Whether the artifact has a tensor, given by its name, as the reference has it."""
    manifest = info.artifact.manifest if info.artifact else None
    recipe = (manifest.recipe if manifest else None) or {}
    is_own = manifest.source.original is None if manifest else info.precision in FLOATS.values()
    if not is_own:
        return lambda name: False  # another tool may fold factors into any
    is_rotated = bool(recipe.get("rotate"))
    has_factors = bool(recipe.get("balance")) or any(
        name in str(recipe.get("algorithm")) for name in SCALINGS
    )

    def is_kept(name: str) -> bool:
        if "/" in name:  # a Dense module's
            return False
        if name.endswith((".q_norm.weight", ".k_norm.weight")):
            return True
        if is_rotated or has_factors:
            return name == "norm.weight" and not is_rotated
        return not (recipe.get("rotate_heads") and name.endswith(".v_proj.bias"))

    return is_kept


def _readers(info: ModelInfo) -> Iterator[tuple[str, Callable[[str], np.ndarray | None]]]:
    """Each file with such tensors, and what reads them; None for one that a graph has not."""
    if info.checkpoint is not None:
        shapes = info.checkpoint.tensor_shapes()
        names = [name for name, shape in shapes.items() if len(shape) == 1]
        weights = open_floats(info.checkpoint, names)
        yield "the weights", lambda name: weights.read_fp32(name) if name in names else None
        return
    assert info.artifact is not None
    for path in graph_paths(info.artifact):
        values = ir.load(path).graph.initializers

        def read(name: str, values: Any = values) -> np.ndarray | None:
            tensor = values[name].const_value if name in values else None
            return None if tensor is None else tensor.numpy().astype(np.float32).ravel()

        yield path.relative_to(info.folder).as_posix(), read


def _error(found: np.ndarray, expected: np.ndarray) -> str | None:
    """How far values are from the expected ones, if that is beyond the limit."""
    if found.shape != expected.shape:
        return f"it has the shape {list(found.shape)}, and the reference's {list(expected.shape)}"
    apart = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    if apart <= FLOAT_LIMIT:  # NaN is not
        return None
    return f"it is off by {apart:.1g} of the reference's largest value"
