"""Bytes in the user's cache folder: written whole or not at all, and checked when read.

Several processes may write a file at once: one of them wins, and readers see old or new bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

DIGEST = hashlib.sha256().digest_size


def read_cached(path: Path) -> bytes | None:
    """The bytes that `write_cached` wrote; None if there are none, or they are damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:DIGEST], data[DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def write_cached(path: Path, content: bytes | memoryview) -> None:
    """Write bytes with their sha256; without the room or the right to, nothing is written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
