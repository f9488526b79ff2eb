"""Checks whether an installed package is new enough for a file."""

from __future__ import annotations

import re


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
