"""The version of embedport."""

__version__ = "0.1.0"
