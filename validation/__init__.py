"""Validation: an artifact against the reference, in numbers."""

from __future__ import annotations

from .report import Report
from .validate import validate

__all__ = ["Report", "validate"]
