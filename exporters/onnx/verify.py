"""A graph just written, opened again and run before anybody else sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ...errors import MissingPackageError, VerificationError
from ...segments import emulate_16_bits, segments
from .dialects import MICROSOFT
from .session import open_session


def verify_graph(
    path: Path,
    ids: np.ndarray,
    advance: Callable[[str], None] = lambda scope: None,
) -> np.ndarray:
    """Check a graph's structure, its external data, and its numbers on one text.

    A session of the whole graph is created, with its weights only mapped; the text then runs part
    by part, so memory stays at one layer.

    Args:
        path: The graph.
        ids: Token ids, int64 [tokens].
        advance: Called with each part's name when it has run.

    Returns:
        The graph's output for the text, float32 [1, …].

    Raises:
        VerificationError: The graph is invalid, its data is short, onnxruntime does not take it,
            or it gives NaN or infinity.
    """
    model = ir.load(path)
    _check_external_data(path, model)
    if MICROSOFT not in model.opset_imports:
        _check_standard(path)
    emulate_16_bits(model)
    _create_session(model, path)
    values = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
    outputs: list[np.ndarray] = []
    for scope, part in segments(model):
        session = _create_session(part, path)
        names = [value.name for value in session.get_outputs()]
        outputs = session.run(None, {each.name: values[each.name] for each in session.get_inputs()})
        for name, found in zip(names, outputs, strict=True):
            if found.dtype.kind == "f" and not np.isfinite(found).all():
                raise VerificationError(
                    f"{path}: {scope} gives {np.count_nonzero(~np.isfinite(found)):,} NaN or "
                    f"infinite values in {name}; export with --precision bf16 or fp32"
                )
        values |= zip(names, outputs, strict=True)
        advance(scope)
    return outputs[0]


def _create_session(model: ir.Model, path: Path) -> Any:
    try:
        return open_session(model, path.parent, pack=False)
    except MissingPackageError:
        raise
    except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
        raise VerificationError(f"{path}: onnxruntime does not take the graph: {error}") from error


def _check_standard(path: Path) -> None:
    """Onnx's checker knows no fused operators: a graph that has them is checked by onnxruntime."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise VerificationError(f"{path} is not a valid ONNX graph: {error}") from error


def _check_external_data(path: Path, model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(tensor.location)
        if location.name != tensor.location:
            raise VerificationError(f"{path}: {value.name} is in {location}, not beside the graph")
        data = path.parent / location
        end = (tensor.offset or 0) + (tensor.length or 0)
        size = data.stat().st_size if data.is_file() else 0
        if data.is_symlink() or size < end:
            raise VerificationError(
                f"{data} should be a plain file of at least {end:,} bytes to hold {value.name}, "
                f"found {size:,}"
            )
