"""Details that only the HTML report shows: agreement per input, scores, layers, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.adapter import WEIGHTS
from ..errors import MissingPackageError, require
from ..files import read_headers
from ..integrity import record_files
from ..runtimes import ModelInfo
from .layers import LayerError
from .reference import Origin
from .report import excerpt
from .tasks import EmbeddingTask, RerankerTask


@dataclass(frozen=True)
class Machine:
    """The machine that a validation ran on.

    Attributes:
        cpu: The processor's name.
        cores: Number of cores that the process may use.
        memory: Bytes of RAM; 0 if unknown.
        system: The operating system.
        python: Python's version.
        providers: onnxruntime's execution providers, the preferred one first; empty if onnxruntime
            is not installed.
    """

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Details:
    """Details of a validation that are not in the report.

    Attributes:
        names: Each input's name in the report.
        excerpts: The beginning of each input's text.
        agreement: Each input's cosine, or absolute score difference for a reranker; NaN if a side
            is not finite. Empty, like the scores, if the token ids differ.
        reference_scores: The scores of the reference run that the gates use: cosines of every query
            with every document, or probabilities. All scores here are finite.
        artifact_scores: The artifact's scores, in the same order.
        layers: The error after each layer; empty if the residual stream cannot be compared, None if
            it was not measured.
        machine: The machine.
        artifact_files: Name to sha256 of the graph and its weights, or of the shards.
        reference_files: Name to sha256 of the reference's shards.
        command: The command line; empty for a call from Python.
    """

    names: tuple[str, ...]
    excerpts: tuple[str, ...]
    agreement: tuple[float, ...]
    reference_scores: tuple[float, ...]
    artifact_scores: tuple[float, ...]
    layers: tuple[LayerError, ...] | None
    machine: Machine
    artifact_files: Mapping[str, str]
    reference_files: Mapping[str, str]
    command: str = ""


def collect_details(
    task: EmbeddingTask | RerankerTask,
    found: np.ndarray | None,
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
        found: The artifact's results, float32 [inputs] or [inputs, dim]; None if the token ids
            differ.
        expected: The reference's results, with the same dim or more.
        info: The artifact, or the checkpoint.
        reference: The reference.
        layers: From `layer_errors`.
        command: Arguments of the command line.
    """
    agreement = reference_scores = artifact_scores = np.empty(0)
    if found is not None and expected is not None:
        agreement = task.agreement(found, expected)
        artifact_scores, reference_scores = map(np.ravel, task.scores(found, expected))
    return Details(
        names=tuple(task.names),
        excerpts=tuple(map(excerpt, task.texts)),
        agreement=tuple(agreement.tolist()),
        reference_scores=tuple(reference_scores.tolist()),
        artifact_scores=tuple(artifact_scores.tolist()),
        layers=layers,
        machine=describe_machine(),
        artifact_files=weight_hashes(info),
        reference_files=dict(reference.files),
        command=shlex.join(command),
    )


def _weight_files(info: ModelInfo) -> list[Path]:
    """The shards, or the graph and the weight files beside it."""
    if info.checkpoint is not None:
        source = info.checkpoint.source
        files = sorted({info.file for info in read_headers(source.folder).values()})
        return files + ([] if source.adapter is None else [source.adapter.folder / WEIGHTS])
    assert info.artifact is not None
    graph = info.artifact.graph
    return sorted(graph.parent.glob(f"{graph.name}*"))


def weight_hashes(info: ModelInfo) -> dict[str, str]:
    """Path of the graph and its weights, or of each shard, to its sha256.

    The path is relative to the model's folder if it is inside.
    """
    folder = info.folder
    return {
        (
            path.relative_to(folder) if path.is_relative_to(folder) else path
        ).as_posix(): record.sha256
        for path, record in record_files(_weight_files(info)).items()
    }


def describe_machine() -> Machine:
    """This machine."""
    try:
        ort = require("onnxruntime", "cpu")
    except MissingPackageError:  # not needed to run a checkpoint
        ort = None
    return Machine(
        cpu=_read_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if os.name == "posix"
        else 0,
        system=_read_field("/etc/os-release", "PRETTY_NAME", "=").strip('"') or platform.platform(),
        python=platform.python_version(),
        providers=tuple(ort.get_available_providers()) if ort else (),
    )


def _read_field(path: str, key: str, separator: str = ":") -> str:
    """The first value of a key in a file of `key separator value` lines; empty if missing."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(separator) for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
