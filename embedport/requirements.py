"""Installed packages: their versions, and whether one is new enough for a file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Name to version of the packages that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def meets(requirement: str, version: str) -> bool:
    """Whether a version is the required one or later.

    Args:
        requirement: For example "onnxruntime>=1.32".
        version: For example "1.32.0"; only the first two numbers are compared.
    """
    required, installed = (
        [int(number) for number in re.findall(r"\d+", text)[:2]]
        for text in (requirement.partition(">=")[2], version)
    )
    return installed >= required
