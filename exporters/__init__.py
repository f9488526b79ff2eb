"""Exporters: a checkpoint becomes what a runtime executes."""
