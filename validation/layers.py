"""The error layer by layer: the artifact's residual stream against the reference's.

A graph runs on the CPU part by part, a layer's weights in memory at a time, on a few texts. A layer
hands on the residual stream and what is still to be added to it, and of 8-bit products its tokens'
scales: their sum is the hidden state that
transformers has after the same layer. A checkpoint's layers are watched in torch, as the
reference's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..artifact import Artifact
from ..errors import require
from ..runtimes import ModelFacts
from ..runtimes.exact import make_exact
from ..segments import emulate_16_bits, segments
from .measures import cosines
from .reference import Reference

TEXTS = 8
# A recorded reference holds the states of all of them, after every layer.
TOKENS = 32
# Names the exporter gives: the parts of a graph, and the way back from a rotated stream.
EMBEDDING, LAYER = "embed_tokens", "layers."
ROTATION = "output.rotation"


@dataclass(frozen=True)
class LayerError:
    """How far the hidden states after a layer are from the reference's.

    Attributes:
        layer: 1 is the first layer; 0 is the embedding table.
        tokens: How many were compared.
        relative_error_mean: Mean over tokens of |artifact - reference| / |reference|.
        relative_error_max: Its maximum; NaN as soon as one value is.
        cosine_min: The smallest cosine of a token's state to the reference's.
    """

    layer: int
    tokens: int
    relative_error_mean: float
    relative_error_max: float
    cosine_min: float


def layer_errors(
    facts: ModelFacts,
    reference: Reference,
    rows: Sequence[Sequence[int] | np.ndarray],
    *,
    device: str = "cpu",
) -> tuple[LayerError, ...]:
    """Compare the hidden states after every layer, on a few of the texts.

    The last layer of a pooled graph keeps the last token of a text only. Where the residual stream
    is rotated it is rotated back by the matrix that the graph holds; an artifact with a baked MRL
    dimension then has only that many values to compare. A checkpoint's are transformers' layers,
    also where our own ran it (runtimes.packed).

    Args:
        facts: The artifact, or the checkpoint.
        reference: The checkpoint it was made from.
        rows: Token ids, int64 [tokens] a text; see `sample_rows`.
        device: Where a checkpoint runs, "cpu" or "cuda".

    Returns:
        The embedding table first, then every layer; empty where the graph rotates its stream and
        does not hold the way back, as a reranker's.

    Raises:
        MissingPackageError: onnxruntime, torch or transformers is not installed.
    """
    sample = sample_rows(rows)
    if facts.checkpoint is not None:
        from ..runtimes.torch import load_layers
        from .live import watch_layers

        found = watch_layers(load_layers(facts.checkpoint, device), sample, device)
        expected = reference.hidden_states(sample)
        return tuple(
            _compare(layer, np.concatenate(states), np.concatenate(wanted))
            for layer, (states, wanted) in enumerate(zip(found, expected, strict=True))
        )
    assert facts.artifact is not None
    return _graph_errors(facts.artifact, reference, sample)


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
    manifest = artifact.manifest
    only_last = manifest.task == "reranker" or manifest.outputs.last_token
    pooled = graph.output == "pooled" and only_last
    errors = []
    for layer, states in enumerate(_artifact_states(model, artifact, sample)):
        wanted = expected[layer]
        if pooled and layer == len(expected) - 1:
            # A graph with even rows has the token twice.
            states, wanted = [each[:1] for each in states], [each[-1:] for each in wanted]
        if basis is not None:
            states = [each @ basis for each in states]
            wanted = [each[:, : basis.shape[1]] for each in wanted]
        errors.append(_compare(layer, np.concatenate(states), np.concatenate(wanted)))
    return tuple(errors)


def sample_rows(rows: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """At most 8 rows, spread over their lengths, each its last 32 tokens at most: int64."""
    by_length = sorted(rows, key=len)
    picked = np.unique(np.linspace(0, len(rows) - 1, TEXTS).round().astype(int))
    return [np.asarray(by_length[i][-TOKENS:], np.int64) for i in picked]


def _basis(model: ir.Model, reference: Reference) -> np.ndarray | None:
    """What a rotated stream is multiplied by to be the checkpoint's: float32 [hidden, n].

    The graph's matrix takes the final norm's output back, and holds the norm's gains beside the
    rotation. None where it is not a rotation without them.
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
    """Hidden states, float32 [tokens, hidden] a row, after the embedding and after each layer."""
    emulate_16_bits(model)
    fixed = [{"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])} for ids in rows]
    streams: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for scope, part in segments(model):
        in_stream = scope == EMBEDDING or scope.startswith(LAYER)
        if streams[0] and not in_stream:
            return  # the final norm and the head
        session = _open_session(part, artifact)
        names = [value.name for value in session.get_outputs()]
        taken = [value.name for value in session.get_inputs()]
        for values, stream in zip(fixed, streams, strict=True):
            known = values | stream
            found = session.run(None, {name: known[name] for name in taken})
            if in_stream:
                stream.clear()  # a layer reads only what the one before it hands on
            (stream if in_stream else values).update(zip(names, found, strict=True))
        del session
        if in_stream:
            # Rows may have a token of padding at their end.
            yield [
                _total(*(value[0, : len(ids)] for value in stream.values()))
                for ids, stream in zip(rows, streams, strict=True)
            ]


def _total(residual: np.ndarray, *product: np.ndarray) -> np.ndarray:
    """The stream with what a layer hands on to be added: maybe a product and its tokens' scales."""
    return residual + math.prod(product) if product else residual


def _open_session(model: ir.Model, artifact: Artifact) -> Any:
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it would keep what the largest run took
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(artifact.graph.parent)
    )
    make_exact(options, artifact)
    graph = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _compare(layer: int, found: np.ndarray, expected: np.ndarray) -> LayerError:
    """Both float32 [tokens, hidden]."""
    sizes = np.linalg.norm(expected.astype(np.float64), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.linalg.norm(found.astype(np.float64) - expected, axis=1) / sizes
    agreement = cosines(found, expected)
    return LayerError(
        layer, len(found), float(errors.mean()), float(errors.max()), float(agreement.min())
    )
