"""Where a graph changes how it computes attention."""

from __future__ import annotations

# Tokens of a row, those that it continues counted, beyond which its attention is fused on a CPU
# (docs/benchmarks.md has the measurement). The kernels round differently, and 8 bits make more of
# that: a batch has short rows or long ones.
SHORT_ROW = 1024
