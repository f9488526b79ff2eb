"""Runtimes: artifacts run here, behind one interface."""
