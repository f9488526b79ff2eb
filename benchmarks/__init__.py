"""Measurements against the tools people would pick instead; each peer in its own environment."""
