"""Validation: an artifact against the reference, in numbers."""
