"""Cleans up the folders that killed runs leave beside an artifact.

An artifact is written in `.NAME.partial-XXXXXXXX`, and the one that it replaces is renamed to
`.NAME.partial-XXXXXXXX-old` before it is deleted. The process that works on such a folder holds a
lock on it, which the system releases when the process ends, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

# Suffix of an artifact that is being replaced.
OLD = "-old"


def tidy_up(output: str | Path) -> None:
    """Delete the folders that killed exports of an artifact have left beside it.

    If an export was killed between its two renames, the earlier artifact gets its name back.
    Folders that another process has locked, or that cannot be changed, stay.

    Args:
        output: The artifact's path; it need not exist.
    """
    output = Path(output).expanduser().absolute()
    leftover = re.compile(rf"\.{re.escape(output.name)}\.partial-[0-9a-f]{{8}}({OLD})?")
    with contextlib.suppress(OSError, ValueError):
        for folder in sorted(output.parent.iterdir()):
            if not leftover.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            try:
                descriptor = lock(folder)
            except BlockingIOError:
                continue
            if descriptor is None:
                continue
            try:
                if folder.name.endswith(OLD) and not os.path.lexists(output):
                    folder.rename(output)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends.

    Args:
        folder: The folder.
        wait: Whether to wait for another process to release it.

    Returns:
        The descriptor; None on systems without such locks, as on Windows, where no process is kept
        out and nothing is cleaned up.

    Raises:
        BlockingIOError: Another process has locked it, and `wait` is false.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
