"""A 4-bit checkpoint on a CPU: its graph, built once into the user's cache folder.

onnxruntime multiplies by packed 4-bit weights on a CPU, torch does not. The graph holds the
checkpoint's own codes, scales and zero points, and computes in fp32 with their values.

    ~/.cache/embedport/graphs/KEY/graph     an artifact without tokenizer and witness

KEY is a hash of the checkpoint's files, the task and embedport's version.
"""

from __future__ import annotations

import logging
import os
import shutil
from importlib.util import find_spec

from ..artifact.folder import Artifact
from ..checkpoint.quantization_config import StoredQuantization
from ..checkpoint.spec import ModelSpec
from ..errors import ArtifactError, InputError
from ..integrity import cache_folder
from ..leftovers import lock
from ..quantize.stored import StoredWeights, warn_of_activations
from ..version import __version__
from .info import hash_files, hash_json

logger = logging.getLogger(__name__)

BITS = 4


def find_stored_graph(spec: ModelSpec) -> Artifact | None:
    """Open a 4-bit checkpoint's graph for the CPU; build it if it is not in the cache.

    Args:
        spec: The checkpoint.

    Returns:
        The graph; None if the checkpoint has no 4-bit codes, or has them and runs unpacked, which
        a warning says with the reason.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
        VerificationError: The graph does not run, or outputs NaN.
    """
    quantization = spec.quantization
    if not isinstance(quantization, StoredQuantization) or not any(
        form.kind == "int" and form.bits == BITS for form in quantization.formats
    ):
        return None
    weights = StoredWeights(spec)
    reason = _why_unpacked(weights)
    if reason is None:
        try:
            artifact = _open_cached(weights)
            warn_of_activations(spec)
            return artifact
        except (OSError, InputError) as error:
            reason = f"its graph cannot be written: {error}"
    logger.warning(
        "%s: its weights are unpacked to 16 bits, and torch runs it: %s",
        spec.source.folder,
        reason,
    )
    return None


def _why_unpacked(weights: StoredWeights) -> str | None:
    """Why a graph cannot run a checkpoint's codes; None if it can."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime, which multiplies by 4-bit weights, is not installed"
    if weights.spec.masked_layers:
        return "attention has a mask, and in a graph it would take memory for all scores at once"
    if unpacked := sorted(weights.formats.keys() - weights.schemes.keys()):
        return (
            f"a graph cannot hold {unpacked[0]} and {len(unpacked) - 1} others "
            f"({' and '.join(weights.describe())})"
        )
    return None


def _open_cached(weights: StoredWeights) -> Artifact:
    spec = weights.spec
    facts = {"embedport": __version__, "task": spec.task, "files": hash_files(spec)}
    folder = cache_folder("graphs") / hash_json(facts)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    graph = folder / "graph"
    # Others wait for the process that builds it.
    descriptor = lock(folder, wait=True)
    try:
        try:
            return Artifact.open(graph)
        except (InputError, ArtifactError):  # not there, or damaged
            shutil.rmtree(graph, ignore_errors=True)
        logger.warning(
            "%s: a graph of its 4-bit weights is written to %s, once", spec.source.folder, graph
        )
        # Exporters are above this package: they are found through the front door.
        from .. import export_stored

        return export_stored(weights, graph)
    finally:
        if descriptor is not None:
            os.close(descriptor)
