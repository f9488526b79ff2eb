"""Folders that killed runs have left beside an artifact, and how they are cleaned up.

An artifact is written in `.NAME.partial-XXXXXXXX`, and the one that it replaces is renamed to
`.NAME.partial-XXXXXXXX-old` before it is deleted. Whoever works on such a folder holds a lock on
it, which the system drops when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

# Ends the name of an artifact that is being replaced.
OLD = "-old"


def tidy_up(output: str | Path) -> None:
    """Delete what killed exports of an artifact have left beside it.

    One that was killed between two renames has left the earlier artifact under its other name: it
    gets its own back. What another process holds, or what may not be changed, stays.

    Args:
        output: The artifact's place; nothing need be there.
    """
    output = Path(output).expanduser().absolute()
    ours = re.compile(rf"\.{re.escape(output.name)}\.partial-[0-9a-f]{{8}}({OLD})?")
    with contextlib.suppress(OSError, ValueError):
        for folder in sorted(output.parent.iterdir()):
            if not ours.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            try:
                held = lock(folder)
            except BlockingIOError:
                continue
            if held is None:
                continue
            try:
                if folder.name.endswith(OLD) and not os.path.lexists(output):
                    folder.rename(output)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def lock(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or the process ends.

    Returns:
        The descriptor; None where locks are unknown, as on Windows: there nobody is kept out, and
        nothing is tidied up.

    Raises:
        BlockingIOError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
