"""Symbolic links in a folder: none may lead out of it, none may be broken."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError


def check_links(folder: Path) -> None:
    """Refuse symbolic links that lead out of a folder, except the hub cache's links to its blobs.

    Raises:
        InputError: There is such a link, or a broken one; or the folder cannot be read.
    """
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    try:
        paths = sorted(folder.rglob("*"))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    for path in paths:
        if not path.is_symlink():
            continue
        _check_link(path)
        target = path.resolve()
        if not any(target.is_relative_to(base) for base in allowed):
            raise InputError(
                f"{path} is a link to {target}, outside the folder; put a copy in its place"
            )


def check_broken_links(folder: Path, patterns: Iterable[str]) -> None:
    """Refuse broken links, which would otherwise be treated like absent files.

    Args:
        folder: A checkpoint's folder.
        patterns: Glob patterns of the files to check.

    Raises:
        InputError: There is a broken link.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_symlink():
                _check_link(path)


def link(path: Path, target: Path) -> None:
    """Make a symbolic link; where the system refuses, a hard link or a copy.

    Windows grants symbolic links to administrators and in its developer mode only.

    Args:
        path: The link to make.
        target: A file or folder, absolute.

    Raises:
        OSError: Not even a copy can be made.
    """
    for make in (path.symlink_to, path.hardlink_to):
        with contextlib.suppress(OSError):
            make(target)
            return
    if target.is_dir():
        shutil.copytree(target, path)
    else:
        shutil.copyfile(target, path)


def _check_link(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        raise InputError(
            f"{path} is a link to {path.readlink()}, which leads to no file ({error.strerror}); "
            "put a copy in its place"
        ) from None
