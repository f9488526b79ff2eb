"""Whether a package that is there is new enough for what a file needs."""

from __future__ import annotations

import re


def meets(requirement: str, version: str) -> bool:
    """Whether a version is the one required or a later one.

    Args:
        requirement: Like "onnxruntime>=1.32".
        version: Like "1.32.0"; the first two numbers count.
    """
    wanted, found = (
        [int(number) for number in re.findall(r"\d+", text)[:2]]
        for text in (requirement.partition(">=")[2], version)
    )
    return found >= wanted
