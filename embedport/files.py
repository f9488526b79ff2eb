"""Files, read and written strictly: only regular files, only up to a size, and whole or not at all.

Folders may be untrusted. Small files are read through `read_small`; JSON through `strict_json`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Generator
from pathlib import Path
from typing import IO

from .errors import InputError

# The file that makes a folder an artifact.
MANIFEST = "embedport.json"
# Maximum bytes of a configuration, an index, a manifest or a shard's header (40,000 tensors).
SMALL = 4 << 20
# Maximum bytes of a text file that is read whole.
MOST_TEXT = 8 << 30
# Maximum bytes of a file name on most file systems.
LONGEST_NAME = 255
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextlib.contextmanager
def written(path: Path) -> Generator[IO[bytes]]:
    """Open a file for writing under a temporary name; rename it once it is complete and synced.

    Raises:
        InputError: The file cannot be written.
    """
    # Not by the process's number: threads share it, and so do containers that write to one volume.
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # numpy's error for a full disk has a text, a count of values, but no strerror.
        reason = error.strerror or f"{error} (is the disk full?)"
        raise InputError(f"{path} cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # on a read-only file system even of a missing file
            partial.unlink()


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Args:
        path: The file; a link is followed.
        limit: Maximum bytes.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is not a regular file, or larger than `limit`.
    """
    check_regular(path)
    # O_NONBLOCK: opening would block if a FIFO has replaced the file since the check.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 (a descriptor)
        status = os.fstat(file.fileno())
        _check_kind(status)
        if status.st_size > limit:
            raise ValueError(f"it should have {limit:,} bytes at most, found {status.st_size:,}")
        # The file may have grown since fstat: read no more than the size that was checked.
        return file.read(status.st_size)


def check_regular(path: Path) -> None:
    """Refuse a FIFO, device, socket or folder: reading one may block or never end.

    Raises:
        OSError: The path is missing.
        ValueError: It is not a regular file.
    """
    _check_kind(path.stat())


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"it should be a regular file, found {kind}")


def check_name(name: str | Path) -> None:
    """Refuse a name that is not UTF-8 before any work: neither JSON nor onnxruntime takes it.

    Raises:
        InputError: It is not.
    """
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"a file's or folder's name is not UTF-8, and has to be: {str(name)!r}; rename it"
        ) from None


def is_file_name(name: object) -> bool:
    """Whether a JSON value is a plain file name: no folder part, and not too long.

    On Windows a colon follows a drive, which joins a path elsewhere, or begins a stream.
    """
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not {"/", "\\", ":", "\0"} & set(name)
        and len(name.encode()) <= LONGEST_NAME
    )
