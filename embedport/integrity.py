"""Checks files against a manifest's sha256; each file is hashed once until it changes.

The user's cache folder stores a file's sha256 under its device, inode, size, mtime and ctime, so
only the first load after a copy or a change hashes gigabytes. On Windows every load does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from .errors import ArtifactError, EmbedportError

# Device, inode, size, mtime and ctime: another file, or other content, has another state. Without
# ctime, a copy that keeps the mtime would pass for a deleted file whose inode it was given.
State = tuple[int, int, int, int, int]

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
    try:
        _check_sizes(folder, expected)
        records = record_files(folder / name for name in expected)
    except OSError as error:  # it is being replaced or deleted, or its disk is failing
        raise ArtifactError(f"{folder} cannot be read: {error}") from error
    for name, record in expected.items():
        if records[folder / name] != record:
            raise ArtifactError(
                f"{folder / name} has changed since it was written: sha256 should be "
                f"{record.sha256}, found {records[folder / name].sha256}; copy or export it again"
            )


def _check_sizes(folder: Path, expected: dict[str, FileRecord]) -> None:
    for name, record in expected.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != record.size:
            raise ArtifactError(
                f"{path} should have {record.size:,} bytes, found {size:,}; copy or export it again"
            )


def read_states(paths: Iterable[Path]) -> dict[Path, State]:
    """The states of those files that are there, for `check_unchanged`."""
    states = {path: _state(path) for path in paths}
    return {path: state for path, state in states.items() if state is not None}


def check_unchanged(states: Mapping[Path, State], kind: type[EmbedportError]) -> None:
    """Refuse what was read from files that were replaced meanwhile: it may be of both.

    Args:
        states: From `read_states`, from before the files were read.
        kind: The error's class.

    Raises:
        EmbedportError: A file has another state; it is of the given kind.
    """
    for path, state in states.items():
        if _state(path) != state:
            raise kind(
                f"{path} was changed or replaced while the model's files were read: do it again "
                "when nothing writes them any more"
            )


def _state(path: Path) -> State | None:
    try:
        status = path.stat()
    except OSError:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        # Of the open file: the path may lead to another one by now.
        status = os.fstat(file.fileno())
        if not CHANGES_SHOW:
            return FileRecord(status.st_size, _hash(file))
        identity = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        # Any write changes ctime, even if mtime is set back afterwards.
        stamp = cache_folder("sha256") / f"{identity}-{status.st_ctime_ns}"
        with contextlib.suppress(OSError):
            sha256 = stamp.read_text(encoding="ascii")
            if len(sha256) == 64:
                return FileRecord(status.st_size, sha256)
        sha256 = _hash(file)
    # If the cache cannot be written, the next load hashes the file again.
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_bytes(sha256.encode())
    return FileRecord(status.st_size, sha256)


def _hash(file: BufferedReader) -> str:
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
