"""What a page shows beyond the report: each input's agreement, scores, layers, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapter import WEIGHTS
from ..files import read_headers
from ..integrity import record_files
from ..runtimes import ModelFacts
from .layers import LayerError
from .reference import Origin
from .report import excerpt
from .tasks import EmbeddingTask, RerankerTask


@dataclass(frozen=True)
class Machine:
    """What a validation ran on.

    Attributes:
        cpu: The processor's name.
        cores: Cores that the process may use.
        memory: Bytes; 0 where the system does not tell.
        system: The operating system.
        python: Its version.
        providers: onnxruntime's execution providers, the preferred one first; none without it.
    """

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Details:
    """What the report does not hold.

    Attributes:
        names: What the report calls each input.
        excerpts: The beginning of each input's text.
        agreement: Of each input: its cosine, or a reranker's absolute difference of scores; NaN
            where one is not finite. Empty, like the scores, when the token ids differ.
        reference_scores: Scores of the run of the reference that the gates are about: cosines of
            every query and every document, or probabilities. Finite, like the artifact's.
        artifact_scores: The artifact's, in the same order.
        layers: The error layer by layer; empty where the residual stream cannot be compared, None
            where nobody measured it.
        machine: What it ran on.
        artifact_files: Name to sha256 of the graph and its weights, or of the shards.
        reference_files: Name to sha256 of the reference's shards.
        command: The command line; empty if it was not one.
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
    facts: ModelFacts,
    reference: Origin,
    layers: tuple[LayerError, ...] | None = None,
    command: Sequence[str] = (),
) -> Details:
    """Details of a validation.

    Args:
        task: The inputs.
        found: The artifact's results, float32 [inputs] or [inputs, dim]; None when the token ids
            differ.
        expected: The reference's, as wide or wider.
        facts: The artifact, or the checkpoint.
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
        artifact_files=_hash(facts.folder, _weight_files(facts)),
        reference_files=dict(reference.files),
        command=shlex.join(command),
    )


def _weight_files(facts: ModelFacts) -> list[Path]:
    """The shards; or the graph, and its weights beside it."""
    if facts.checkpoint is not None:
        source = facts.checkpoint.source
        files = sorted({info.file for info in read_headers(source.folder).values()})
        return files + ([] if source.adapter is None else [source.adapter.folder / WEIGHTS])
    assert facts.artifact is not None
    graph = facts.artifact.graph
    return sorted(graph.parent.glob(f"{graph.name}*"))


def _hash(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Path, relative in the model's folder, to sha256."""
    return {
        (
            path.relative_to(folder) if path.is_relative_to(folder) else path
        ).as_posix(): record.sha256
        for path, record in record_files(files).items()
    }


def describe_machine() -> Machine:
    """This machine."""
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:  # a checkpoint needs none
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
    """The first value of a key in a file of lines; empty where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(separator) for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
