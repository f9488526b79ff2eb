"""Measurements against alternative tools; each peer runs in its own environment."""
