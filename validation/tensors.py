"""Tensors that are not rounded to few bits: norms, biases, heads, the Dense modules' in the folder.

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
from ..texts.prompts import find_answers
from .report import Gate, unchecked
from .table import FLOAT_LIMIT

# Name to values, float32: a vector, or a Dense matrix's products [out, DIRECTIONS].
Tensors = Mapping[str, np.ndarray]

GATE = "tensors that differ"
DIRECTIONS = 8
# A reranker's head in a graph: W_yes - W_no, or one of them.
HEAD = "score.weight"
# Tensors that the gate names.
NAMED = 5


def read_tensors(spec: ModelSpec) -> Tensors:
    """Read a reference's tensors, with its adapter if it has one.

    Returns:
        Norms and biases by their `Qwen3Model` names, float32 [size]; a reranker's head as `HEAD`,
        float32 [hidden_size]; each Dense module's bias, float32 [out], and its matrix times random
        directions, float32 [out, DIRECTIONS].

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
    """
    return _vectors(spec) | dict(_dense_tensors(spec.outputs, spec.source.pipeline))


def tensors_gate(info: ModelInfo, expected: Tensors | None) -> Gate:
    """No tensor is farther from the reference's than rounding to 16 bits explains.

    Those that the recipe's transformations change are left out.

    Args:
        info: The artifact, or the checkpoint.
        expected: The reference's; None if they are not known.
    """
    if expected is None:
        return unchecked(GATE, "this recorded reference has no such tensors: record it again")
    kept = _find_kept(info)
    # A checkpoint of another tool may name its modules otherwise, and runs them itself.
    outputs = info.outputs if info.artifact is not None else Outputs()
    if kept is None and not outputs.dense:
        return unchecked(GATE, "another tool may have folded factors into any of them")
    wrong = []
    for place, read in _readers(info) if kept else ():
        for name in filter(kept, expected):
            if (error := _error(read(name), expected[name])) is not None:
                wrong.append(f"{place}: {name}: {error}")
    try:
        for name, found in _dense_tensors(outputs, info.folder):
            if (error := _error(found, expected.get(name, np.empty(0)))) is not None:
                wrong.append(f"{name}: {error}")
    except CheckpointError as error:
        wrong.append(str(error))
    rest = f"; and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
    return Gate(GATE, len(wrong), "≤", 0, "; ".join(wrong[:NAMED]) + rest)


def _vectors(spec: ModelSpec) -> dict[str, np.ndarray]:
    """A checkpoint's norms and biases, and the difference of a reranker's two rows."""
    names = [name for name, shape in spec.tensor_shapes().items() if len(shape) == 1]
    has_head = spec.task == "reranker"
    weights = open_floats(spec, [*names, *([spec.head] if has_head else [])])
    vectors = {name: weights.read_fp32(name) for name in names}
    return vectors | ({HEAD: weights.answer_row(*find_answers(spec))} if has_head else {})


def _dense_tensors(outputs: Outputs, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The Dense modules' tensors, as sentence-transformers reads them of the folder."""
    for dense in outputs.dense:
        for name, tensor in vars(read_dense(folder, dense)).items():
            if tensor is not None:
                yield f"{dense.path}/{name}", tensor if tensor.ndim == 1 else _products(tensor)


def _products(matrix: np.ndarray) -> np.ndarray:
    generator = np.random.default_rng(0)
    return matrix @ generator.standard_normal((matrix.shape[1], DIRECTIONS), np.float32)


def _find_kept(info: ModelInfo) -> Callable[[str], bool] | None:
    """Whether the artifact has a tensor as the reference has it; None if that is not known."""
    manifest = info.artifact.manifest if info.artifact else None
    is_own = manifest.source.original is None if manifest else info.precision in FLOATS.values()
    if not is_own:
        return None
    recipe = (manifest.recipe if manifest else None) or {}
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
            return name in ("norm.weight", HEAD) and not is_rotated
        return not (recipe.get("rotate_heads") and name.endswith(".v_proj.bias"))

    return is_kept


def _readers(info: ModelInfo) -> Iterator[tuple[str, Callable[[str], np.ndarray | None]]]:
    """Each file with such tensors, and what reads them; None for one that it has not."""
    if info.checkpoint is not None:
        yield "the weights", _vectors(info.checkpoint).get
        return
    assert info.artifact is not None
    graph = info.artifact.manifest.graph
    assert graph is not None
    for path in graph.paths:
        values = ir.load(info.folder / path).graph.initializers

        def read(name: str, values: Any = values) -> np.ndarray | None:
            tensor = values[name].const_value if name in values else None
            return None if tensor is None else tensor.numpy().astype(np.float32).ravel()

        yield path, read


def _error(found: np.ndarray | None, expected: np.ndarray) -> str | None:
    """How far values are from the expected ones, if that is beyond the limit."""
    if found is None:
        return "it is missing"
    if found.shape != expected.shape:
        return f"it has the shape {list(found.shape)}, and the reference's {list(expected.shape)}"
    apart = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    if apart <= FLOAT_LIMIT:  # NaN is not
        return None
    return f"it is off by {apart:.1g} of the reference's largest value"
