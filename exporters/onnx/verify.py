"""Verify a graph that was just written: open it again and run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ...artifact.segments import emulate_16_bits, segments
from ...attention import SHORT_ROW
from ...errors import MissingPackageError, VerificationError
from ...runtimes.part_session import open_session
from ..graph.dialect import MICROSOFT
from ..graph.qwen3 import PROMPT_LENGTH

# Largest allowed difference of scores: weights and the rounding of activations are the same.
MOST_APART = 1e-4


def verify_graph(
    path: Path,
    ids: np.ndarray,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Check a graph's structure, its external data, and its numbers on one text.

    A session of the whole graph is opened with memory-mapped weights; the text then runs part by
    part, so memory holds one layer.

    Args:
        path: The graph.
        ids: Token ids, int64 [tokens].
        advance: Called after each part of the graph.

    Returns:
        The graph's first output for the text, float32 [1, …].

    Raises:
        VerificationError: The graph is invalid, its data is short, onnxruntime rejects it,
            or it outputs NaN or infinity.
    """
    model = _open_graph(path)
    return run_parts(model, path, [_feeds(ids)], advance)[0][0]


def run_texts(path: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Open a graph as `verify_graph` does, and run one text: its outputs by name.

    Args:
        path: The graph.
        ids: Token ids, int64 [tokens].

    Raises:
        VerificationError: As `verify_graph`.
    """
    model = _open_graph(path)
    (outputs,) = run_parts(model, path, [_feeds(ids)], lambda: None)
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, outputs, strict=True))


def verify_continuation(
    path: Path,
    ids: np.ndarray,
    expected: np.ndarray,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Check a continuation graph: a text run in two parts gives the same result as in one.

    Args:
        path: The graph.
        ids: Token ids, int64 [tokens], at least two.
        expected: The output for the text of the graph without a past.
        advance: Called after each part of the graph.

    Raises:
        VerificationError: As `verify_graph`, or the results differ.
    """
    model = _open_graph(path)
    half = len(ids) // 2
    shape = next(value.shape for value in model.graph.inputs if value.name == "past") or ()
    # The only symbolic dimension is the number of tokens.
    past = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    for part, kept in ((ids[:half], half), (ids[half:], 0)):
        feeds = _feeds(part) | {
            "past": past,
            "kept": np.array([kept]),
            "short": np.array(len(ids) <= SHORT_ROW),
        }
        ((past, output, *_),) = run_parts(model, path, [feeds], advance)
    if np.abs(output - expected).max() > MOST_APART:
        raise VerificationError(
            f"{path}: a text in two parts gives {output}, in one {expected}; they should be within "
            f"{MOST_APART}"
        )


def _open_graph(path: Path) -> ir.Model:
    """Open a graph to run on a CPU; check that it is complete and that onnxruntime takes it."""
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
        PROMPT_LENGTH: np.zeros(1, np.int64),  # read only if the graph has this input
    }


def run_parts(
    model: ir.Model,
    path: Path,
    batches: Sequence[dict[str, np.ndarray]],
    advance: Callable[[], None],
    *,
    as_loaded: bool = False,
) -> list[list[np.ndarray]]:
    """Compute a graph's outputs for each batch, part by part: memory holds one layer's weights.

    Args:
        model: The graph.
        path: Its file, with its weights beside it.
        batches: Inputs by name.
        advance: Called after each part of the graph.
        as_loaded: Whether to optimize and pack parts and use the package's kernels, as
            `embedport.load` does. This copies a layer's weights.

    Raises:
        VerificationError: onnxruntime rejects a part, or it outputs NaN or infinity.
    """
    states = [dict(feeds) for feeds in batches]
    outputs = [str(value.name) for value in model.graph.outputs]
    parts = list(segments(model))
    # Each value's name to the last part that reads it.
    last_reader = {
        str(value.name): i for i, (_, part) in enumerate(parts) for value in part.graph.inputs
    }
    last_reader |= dict.fromkeys(outputs, len(parts))
    for i, (scope, part) in enumerate(parts):
        session = _create_session(part, path, as_loaded=as_loaded)
        read_later = {name for name, last in last_reader.items() if last > i}
        for j in range(len(states)):
            values = states[j] | _run_part(session, path, scope, states[j])
            states[j] = {name: value for name, value in values.items() if name in read_later}
            del values
        advance()
    return [[values[name] for name in outputs] for values in states]


def _run_part(
    session: Any, path: Path, scope: str, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(None, {value.name: values[value.name] for value in session.get_inputs()})
    for name, output in zip(names, outputs, strict=True):
        if output.dtype.kind == "f" and not np.isfinite(output).all():
            raise VerificationError(
                f"{path}: {scope} gives {np.count_nonzero(~np.isfinite(output)):,} NaN or "
                f"infinite values in {name}: in fp16 it overflows (take `precision` bf16 or "
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
    """Run onnx's checker. It does not know fused operators: onnxruntime checks those graphs."""
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
