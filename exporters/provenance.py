"""Provenance records for the manifest, and progress reports."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable

from ..artifact.manifest import AdapterRecord, Manifest, SourceRecord
from ..checkpoint.spec import ModelSpec
from ..checkpoint.weights import Weights
from ..errors import ArtifactError
from ..files import MANIFEST
from ..integrity import record_files
from ..requirements import installed_versions

# Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def counted(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Return a function that reports one more finished step of a stage at each call."""
    steps = iter(range(1, total + 1))
    return lambda: progress(stage, next(steps), total)


def source_record(weights: Weights) -> SourceRecord:
    """Record the checkpoint and its adapter, with their files' hashes."""
    records = record_files(weights.files)
    source = weights.spec.source
    files = {path.name: record.sha256 for path, record in records.items()}
    adapter, original = adapter_record(weights.spec), _original(weights.spec)
    return SourceRecord(source.id, source.revision, files, adapter, original)


def _original(spec: ModelSpec) -> tuple[str, ...] | None:
    """How `validate` names the original of a quantized checkpoint; None if it is not quantized.

    Only checkpoints that embedport quantized say what they were made from.
    """
    if spec.quantization is None:
        return None
    try:
        return Manifest.from_json(spec.source.folder / MANIFEST).source.options
    except ArtifactError:
        return ("--reference", "ORIGINAL")


def adapter_record(spec: ModelSpec) -> AdapterRecord | None:
    """Record the adapter merged into a checkpoint's weights; None without one."""
    adapter, source = spec.adapter, spec.source.adapter
    if adapter is None or source is None:
        return None
    return AdapterRecord(source.id, source.revision, adapter.rank, adapter.alpha, adapter.targets)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed, by name."""
    return {"python": platform.python_version()} | installed_versions(packages)
