"""What a manifest says of how an artifact came to be, and how its making reports progress."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

from ..integrity import record_files
from ..manifest import AdapterRecord, SourceRecord
from ..spec import ModelSpec
from ..weights import Weights

# Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def counted(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A function that reports one step more of a stage each time."""
    done = iter(range(1, total + 1))
    return lambda: progress(stage, next(done), total)


def source_record(weights: Weights) -> SourceRecord:
    """The checkpoint and its adapter, with the hashes of their files."""
    records = record_files(weights.files)
    source = weights.spec.source
    files = {path.name: each.sha256 for path, each in records.items()}
    return SourceRecord(source.id, source.revision, files, adapter_record(weights.spec))


def adapter_record(spec: ModelSpec) -> AdapterRecord | None:
    """The adapter that is merged into a checkpoint's weights."""
    adapter, source = spec.adapter, spec.source.adapter
    if adapter is None or source is None:
        return None
    return AdapterRecord(source.id, source.revision, adapter.rank, adapter.alpha, adapter.targets)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version, and that of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
