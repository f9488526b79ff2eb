"""Checks files against a manifest's sha256; each file is hashed once until it changes.

The user's cache folder stores a file's sha256 under its device, inode, size, mtime and ctime, so
only the first load after a copy or a change hashes gigabytes. On Windows every load does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .errors import ArtifactError

# Windows has the time of creation for ctime: a change that keeps size and mtime would not show.
CHANGES_SHOW = os.name == "posix"


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def record_files(paths: Iterable[Path]) -> dict[Path, FileRecord]:
    """Hash files, two at a time, and cache the results."""
    paths = list(paths)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(paths, pool.map(_record, paths), strict=True))


def check_files(folder: Path, expected: dict[str, FileRecord]) -> None:
    """Check files of a folder against their records.

    Args:
        folder: The folder that the names in `expected` are relative to.
        expected: Relative posix path to record.

    Raises:
        ArtifactError: A file is missing, or its size or sha256 differs.
    """
    for name, record in expected.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != record.size:
            raise ArtifactError(
                f"{path} should have {record.size:,} bytes, found {size:,}; copy or export it again"
            )
    records = record_files(folder / name for name in expected)
    for name, record in expected.items():
        if records[folder / name] != record:
            raise ArtifactError(
                f"{folder / name} has changed since it was written: sha256 should be "
                f"{record.sha256}, found {records[folder / name].sha256}; copy or export it again"
            )


def _record(path: Path) -> FileRecord:
    status = path.stat()
    if not CHANGES_SHOW:
        return FileRecord(status.st_size, _hash(path))
    identity = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    # Any write changes ctime, even if mtime is set back afterwards.
    stamp = cache_folder("sha256") / f"{identity}-{status.st_ctime_ns}"
    with contextlib.suppress(OSError, ValueError):
        sha256 = stamp.read_text(encoding="ascii")
        if len(sha256) == 64:
            return FileRecord(status.st_size, sha256)
    sha256 = _hash(path)
    # If the cache cannot be written, the next load hashes the file again.
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_bytes(sha256.encode())
    return FileRecord(status.st_size, sha256)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path:
    """The cache folder of this name, below embedport's in the user's cache folder.

    For a user without a home, as a container's may be, it is a place where nothing can be written.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        base = os.devnull
    return Path(base) / "embedport" / name
