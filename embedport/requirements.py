"""Installed packages: their versions, and whether one is new enough for a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Name to version of the packages that are installed."""
    versions = {name: _version(name) for name in packages}
    return {name: number for name, number in versions.items() if number is not None}


@cache
def _version(package: str) -> str | None:
    """A package's version; to read it parses the whole of the package's description."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
