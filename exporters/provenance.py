"""What a manifest says of how an artifact came to be, and how its making reports progress."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

from ..integrity import record_files
from ..manifest import SourceRecord
from ..weights import Weights

# Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def counted(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A function that reports one step more of a stage each time."""
    done = iter(range(1, total + 1))
    return lambda: progress(stage, next(done), total)


def source_record(weights: Weights) -> SourceRecord:
    """The checkpoint, with its shards' hashes."""
    records = record_files(weights.files)
    source = weights.spec.source
    return SourceRecord(
        source.id, source.revision, {path.name: each.sha256 for path, each in records.items()}
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version, and that of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
