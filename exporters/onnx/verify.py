"""A graph just written, opened again and run before anybody else sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ...attention import SHORT_ROW
from ...errors import MissingPackageError, VerificationError
from ...segments import emulate_16_bits, segments
from .dialect import MICROSOFT
from .graph import PROMPT_LENGTH
from .session import open_session

# Scores, at the same weights and the same rounding of activations.
MOST_APART = 1e-4


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
    model = _open_graph(path)
    return run_parts(model, path, [_feeds(ids)], advance)[0][-1]


def verify_continuation(
    path: Path,
    ids: np.ndarray,
    expected: np.ndarray,
    advance: Callable[[str], None] = lambda scope: None,
) -> None:
    """Check a graph that continues: a text in two parts gives what it gives in one.

    Args:
        path: The graph.
        ids: Token ids, int64 [tokens], at least two.
        expected: What the graph without a past gives for the text.
        advance: Called with each part's name when it has run.

    Raises:
        VerificationError: As `verify_graph`, or the results differ.
    """
    model = _open_graph(path)
    half = len(ids) // 2
    shape = next(value.shape for value in model.graph.inputs if value.name == "past") or ()
    # The one dimension without a number is the tokens'.
    past = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    for part, kept in ((ids[:half], half), (ids[half:], 0)):
        feeds = _feeds(part) | {
            "past": past,
            "kept": np.array([kept]),
            "short": np.array(len(ids) <= SHORT_ROW),
        }
        ((past, found),) = run_parts(model, path, [feeds], advance)
    if np.abs(found - expected).max() > MOST_APART:
        raise VerificationError(
            f"{path}: a text in two parts gives {found}, in one {expected}; they should be within "
            f"{MOST_APART}"
        )


def _open_graph(path: Path) -> ir.Model:
    """A graph that is whole and that onnxruntime takes, ready to run on a CPU."""
    model = ir.load(path)
    _check_external_data(path, model)
    if MICROSOFT not in model.opset_imports:
        _check_standard(path)
    emulate_16_bits(model)
    _create_session(model, path)
    return model


def _feeds(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones_like(ids[None]),
        PROMPT_LENGTH: np.zeros(1, np.int64),  # where the graph takes it
    }


def run_parts(
    model: ir.Model,
    path: Path,
    batches: Sequence[dict[str, np.ndarray]],
    advance: Callable[[str], None],
    *,
    as_loaded: bool = False,
) -> list[list[np.ndarray]]:
    """A graph's outputs for each batch, computed part by part: one layer's weights in memory.

    Args:
        model: The graph.
        path: Its file, beside which its weights are.
        batches: Inputs by name.
        advance: Called with each part's name when it has run.
        as_loaded: Whether parts are optimized, packed and run by the kernels as in the session of
            `embedport.load`, which takes a copy of a layer's weights.

    Raises:
        VerificationError: onnxruntime does not take a part, or it gives NaN or infinity.
    """
    states = [dict(feeds) for feeds in batches]
    outputs = [str(value.name) for value in model.graph.outputs]
    parts = list(segments(model))
    # A value to the last part that reads it.
    needed = {
        str(value.name): i for i, (_, part) in enumerate(parts) for value in part.graph.inputs
    }
    needed |= dict.fromkeys(outputs, len(parts))
    for i, (scope, part) in enumerate(parts):
        session = _create_session(part, path, as_loaded=as_loaded)
        kept = {name for name, last in needed.items() if last > i}
        for j in range(len(states)):
            states[j] = _run_through(session, path, scope, states[j], kept)
        advance(scope)
    return [[values[name] for name in outputs] for values in states]


def _run_through(
    session: Any, path: Path, scope: str, values: dict[str, np.ndarray], kept: set[str]
) -> dict[str, np.ndarray]:
    """A batch's values behind a part, without those that no later part reads."""
    known = values | _run_part(session, path, scope, values)
    return {name: each for name, each in known.items() if name in kept}


def _run_part(
    session: Any, path: Path, scope: str, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(None, {each.name: values[each.name] for each in session.get_inputs()})
    for name, found in zip(names, outputs, strict=True):
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise VerificationError(
                f"{path}: {scope} gives {np.count_nonzero(~np.isfinite(found)):,} NaN or "
                f"infinite values in {name}: in fp16 it overflows (take --precision bf16 or "
                "fp32), otherwise the checkpoint's weights are damaged"
            )
    return dict(zip(names, outputs, strict=True))


def _create_session(model: ir.Model, path: Path, *, as_loaded: bool = False) -> Any:
    try:
        return open_session(model, path.parent, pack=as_loaded, kernels=as_loaded)
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
