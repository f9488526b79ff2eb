"""Where a graph changes how it computes attention."""

from __future__ import annotations

# Tokens of a row, those that it continues counted. Up to here all scores of a row are held at once,
# beyond it they are not: results differ by rounding, so a batch has short rows or long ones
# (docs/benchmarks.md has the measurement).
SHORT_ROW = 1024
