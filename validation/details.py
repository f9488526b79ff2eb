"""Details that only the HTML report shows: agreement per input, scores, layers, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint.adapter import WEIGHTS
from ..checkpoint.tensor_files import read_headers
from ..integrity import record_files
from ..runtimes import ModelInfo
from ..tables import command_words
from .layers import LayerError
from .reference import Origin
from .tasks import AnyTask


@dataclass(frozen=True)
class Details:
    """Details of a validation that are not in the report.

    Attributes:
        agreement: Each input's cosine, or absolute score difference for a reranker, float64
            [inputs]; NaN if a side is not finite. Empty, like the scores, if the token ids differ.
        reference_scores: The scores of the reference run that the gates use: cosines of every query
            with every document, or probabilities, float64 [scores]. All are finite.
        artifact_scores: The artifact's scores, in the same order.
        layers: The error after each layer; empty if the residual stream cannot be compared, None if
            it was not measured.
        artifact_files: Name to sha256 of the graph and its weights, or of the shards.
        reference_files: Name to sha256 of the reference's shards.
        command: The command line; empty for a call from Python.
    """

    agreement: np.ndarray
    reference_scores: np.ndarray
    artifact_scores: np.ndarray
    layers: tuple[LayerError, ...] | None
    artifact_files: Mapping[str, str]
    reference_files: Mapping[str, str]
    command: str = ""


def collect_details(
    task: AnyTask,
    results: np.ndarray | None,
    expected: np.ndarray | None,
    *,
    info: ModelInfo,
    reference: Origin,
    layers: tuple[LayerError, ...] | None = None,
    command: Sequence[str] = (),
) -> Details:
    """Collect the details of a validation.

    Args:
        task: The inputs.
        results: The artifact's results, float32 [inputs] or [inputs, dim]; None if the token ids
            differ.
        expected: The reference's results, with the same dim or more.
        info: The artifact, or the checkpoint.
        reference: The reference.
        layers: From `layer_errors`.
        command: Arguments of the command line.
    """
    agreement = reference_scores = artifact_scores = np.empty(0)
    if results is not None and expected is not None:
        agreement = task.agreement(results, expected)
        artifact_scores, reference_scores = map(np.ravel, task.scores(results, expected))
    return Details(
        agreement=agreement,
        reference_scores=reference_scores,
        artifact_scores=artifact_scores,
        layers=layers,
        artifact_files=_weight_hashes(info),
        reference_files=dict(reference.files),
        command=command_words(command),
    )


def _weight_hashes(info: ModelInfo) -> dict[str, str]:
    """Path of the graph and its weights, or of each shard, to its sha256.

    The path is relative to the model's folder if it is inside.
    """
    if info.checkpoint is not None:
        source = info.checkpoint.source
        paths = sorted({tensor.file for tensor in read_headers(source.folder).values()})
        paths += [] if source.adapter is None else [source.adapter.folder / WEIGHTS]
    else:
        assert info.artifact is not None
        graph = info.artifact.graph
        paths = sorted(graph.parent.glob(f"{graph.name}*"))
    hashes = {}
    for path, record in record_files(paths).items():
        is_inside = path.is_relative_to(info.folder)
        name = path.relative_to(info.folder) if is_inside else path
        hashes[name.as_posix()] = record.sha256
    return hashes
