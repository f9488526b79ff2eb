"""The row length at which a graph switches its attention kernel."""

from __future__ import annotations

# Rows longer than this many tokens, cached ones included, use fused attention on a CPU
# (measured in docs/benchmarks.md). The two kernels round differently, and 8-bit quantization
# amplifies the difference, so a batch has only short rows or only long ones.
SHORT_ROW = 1024
