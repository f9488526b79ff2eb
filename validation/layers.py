"""The error after each layer: the artifact's hidden states against the reference's.

A graph runs on the CPU in segments on a few texts, with one layer's weights in memory at a time. A
layer outputs the residual stream and the product still to be added to it; an 8-bit product comes
with its per-token scales. Their sum is the hidden state that transformers has after that layer. For
a checkpoint, forward hooks in torch record the layers, as for the reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..artifact.folder import Artifact
from ..artifact.segments import EMBEDDING, ROTATION, emulate_16_bits, segments
from ..errors import InputError
from ..runtimes import ModelInfo
from ..runtimes.part_session import open_session
from ..runtimes.vectors import cosines
from .reference import Reference

TEXTS = 8
# Tokens kept of each text: a recorded reference stores their states after every layer.
TOKENS = 32
# How the exporter's names of the layers' scopes begin.
LAYER = "layers."


@dataclass(frozen=True)
class LayerError:
    """How far the hidden states after a layer are from the reference's.

    Attributes:
        layer: 1 is the first layer; 0 is the embedding table.
        tokens: Number of compared tokens.
        relative_error_mean: Mean over tokens of |artifact - reference| / |reference|.
        relative_error_max: Maximum over tokens; NaN if any value is NaN.
        cosine_min: Smallest cosine of a token's state and the reference's.
    """

    layer: int
    tokens: int
    relative_error_mean: float
    relative_error_max: float
    cosine_min: float


def layer_errors(
    info: ModelInfo,
    reference: Reference,
    rows: Sequence[Sequence[int] | np.ndarray],
    *,
    device: str = "cpu",
) -> tuple[LayerError, ...]:
    """Compare the hidden states after every layer, on a few of the texts.

    The last layer of a pooled graph keeps only each text's last token. A rotated residual stream is
    rotated back with the matrix in the graph; if the artifact has a baked-in MRL dimension, only
    that many values can be compared. For a checkpoint, transformers' layers are compared, even if
    our own layers (runtimes.varlen) or a graph (runtimes.stored_graph) ran it.

    Args:
        info: The artifact, or the checkpoint.
        reference: The reference.
        rows: Each text's token ids, int64 [tokens]; `sample_rows` selects from them.
        device: The checkpoint's device, "cpu" or "cuda".

    Returns:
        The embedding table first, then every layer. Empty if the graph's residual stream is rotated
        and the graph has no matrix to rotate it back, as in a reranker.

    Raises:
        InputError: The reference has another number of layers.
        MissingPackageError: onnxruntime, torch or transformers is not installed.
    """
    sample = sample_rows(rows)
    if info.checkpoint is not None:
        from ..runtimes.torch import load_layers
        from .live import watch_layers

        states = watch_layers(load_layers(info.checkpoint, device), sample, device)
        return _compare_layers(states, reference.hidden_states(sample))
    assert info.artifact is not None
    return _graph_errors(info.artifact, reference, sample)


def _graph_errors(
    artifact: Artifact, reference: Reference, sample: Sequence[np.ndarray]
) -> tuple[LayerError, ...]:
    graph = artifact.manifest.graph
    assert graph is not None
    model = ir.load(artifact.graph)
    rotated = ROTATION in model.graph.initializers
    basis = _basis(model, reference) if rotated else None
    if basis is None and (rotated or (artifact.manifest.recipe or {}).get("rotate")):
        return ()
    expected = reference.hidden_states(sample)
    states = list(_artifact_states(model, artifact, sample))
    if basis is not None:
        states = [[row @ basis for row in rows] for rows in states]
        expected = [[row[:, : basis.shape[1]] for row in rows] for rows in expected]
    manifest = artifact.manifest
    only_last = manifest.task == "reranker" or manifest.outputs.last_token
    return _compare_layers(states, expected, last=graph.output == "pooled" and only_last)


def largest_growth(errors: Sequence[LayerError]) -> tuple[LayerError, LayerError] | None:
    """The errors before and after the layer in which the mean error grows most.

    After the last layer of a pooled graph only each text's last token is left: it does not count.

    Returns:
        None if nothing can be compared: no layers, or errors that are not finite.
    """
    comparable = [error for error in errors if error.tokens == errors[0].tokens]
    if len(comparable) < 2 or not all(math.isfinite(e.relative_error_mean) for e in errors):
        return None
    return max(
        itertools.pairwise(comparable),
        key=lambda pair: pair[1].relative_error_mean - pair[0].relative_error_mean,
    )


def sample_rows(rows: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """At most 8 rows, spread over their lengths; the last 32 tokens of each at most, int64."""
    by_length = sorted(rows, key=len)
    indices = np.unique(np.linspace(0, len(rows) - 1, TEXTS).round().astype(int))
    return [np.asarray(by_length[i][-TOKENS:], np.int64) for i in indices]


def _basis(model: ir.Model, reference: Reference) -> np.ndarray | None:
    """The matrix that turns a rotated stream into the checkpoint's: float32 [hidden, n].

    The graph's matrix rotates the final norm's output back, and also contains the norm's gains.
    Returns None if the matrix without the gains is not a rotation.
    """
    tensor = model.graph.initializers[ROTATION].const_value
    assert tensor is not None
    matrix = tensor.numpy()
    width = matrix.shape[1]
    gains = reference.final_norm()[:width]
    with np.errstate(divide="ignore", invalid="ignore"):
        basis = matrix / gains
        square = basis.T @ basis
    return basis if np.allclose(square, np.eye(width), atol=1e-2) else None


def _artifact_states(
    model: ir.Model, artifact: Artifact, rows: Sequence[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """Yield each row's hidden states, float32 [tokens, hidden], after the embedding and layers."""
    emulate_16_bits(model)
    inputs = [{"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])} for ids in rows]
    streams: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for scope, part in segments(model):
        in_stream = scope == EMBEDDING or scope.startswith(LAYER)
        if streams[0] and not in_stream:
            return  # what follows is the final norm and the head
        session = open_session(part, artifact.graph.parent, pack=True, artifact=artifact)
        output_names = [value.name for value in session.get_outputs()]
        input_names = [value.name for value in session.get_inputs()]
        for values, stream in zip(inputs, streams, strict=True):
            available = values | stream
            results = session.run(None, {name: available[name] for name in input_names})
            if in_stream:
                stream.clear()  # a layer reads only the outputs of the one before it
            (stream if in_stream else values).update(zip(output_names, results, strict=True))
        del session
        if in_stream:
            # Rows may end with a padding token.
            yield [
                _total(*(value[0, : len(ids)] for value in stream.values()))
                for ids, stream in zip(rows, streams, strict=True)
            ]


def _total(residual: np.ndarray, *product: np.ndarray) -> np.ndarray:
    """Add a layer's product, if any, times its per-token scales, if any, to the residual stream."""
    return residual + math.prod(product) if product else residual


def _compare_layers(
    states: list[list[np.ndarray]], expected: list[list[np.ndarray]], *, last: bool = False
) -> tuple[LayerError, ...]:
    """Compare each layer's rows of hidden states, float32 [tokens, hidden] each.

    With `last`, the artifact's last layer has each row's last token only.
    """
    if len(states) != len(expected):
        raise InputError(
            f"the artifact has {len(states) - 1} layers and the reference {len(expected) - 1}: "
            "give the checkpoint that it was made from"
        )
    if last:
        # A graph that pads rows to an even number of tokens has the token twice.
        states[-1] = [row[:1] for row in states[-1]]
        expected[-1] = [row[-1:] for row in expected[-1]]
    return tuple(
        _compare(layer, np.concatenate(rows), np.concatenate(expected_rows))
        for layer, (rows, expected_rows) in enumerate(zip(states, expected, strict=True))
    )


def _compare(layer: int, states: np.ndarray, expected: np.ndarray) -> LayerError:
    sizes = np.linalg.norm(expected.astype(np.float64), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.linalg.norm(states.astype(np.float64) - expected, axis=1) / sizes
    agreement = cosines(states, expected)
    return LayerError(
        layer, len(states), float(errors.mean()), float(errors.max()), float(agreement.min())
    )
