"""Validation: an artifact against the reference, in numbers."""

from __future__ import annotations

from .mteb_tasks import mteb_model
from .parity import validate
from .recorder import record_reference
from .report import Report

__all__ = ["Report", "mteb_model", "record_reference", "validate"]
