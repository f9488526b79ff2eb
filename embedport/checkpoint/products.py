"""Products of weights that do not depend on the CPU, nor on the rows that are computed together.

In float32 both change the order of sums, and so a result's last bits. Weights that differ in those
round to other codes: an artifact would depend on the machine that exported it.
"""

from __future__ import annotations

import numpy as np

# Rows that are held in float64 at a time.
BLOCK_ROWS = 4096


def multiply(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Multiply in float64, and round.

    Args:
        values: float32 [rows, in].
        matrix: float32 [in, out].

    Returns:
        float32 [rows, out].
    """
    wide = matrix.astype(np.float64)
    result = np.empty((len(values), matrix.shape[1]), np.float32)
    for start in range(0, len(values), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        result[rows] = values[rows].astype(np.float64) @ wide
    return result
