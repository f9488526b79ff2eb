"""The built-in demonstration."""
