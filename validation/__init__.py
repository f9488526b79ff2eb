"""Validation: an artifact against the reference, in numbers."""

from __future__ import annotations

from .parity import validate
from .recorder import record_reference
from .report import Report

__all__ = ["Report", "record_reference", "validate"]
