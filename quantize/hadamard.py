"""Randomized Hadamard matrices, by which weights are rotated.

They are applied by the fast Walsh-Hadamard transform: sums of pairs, log2(size) times (Fino and
Algazi, IEEE Transactions on Computers 25, 1976). It takes additions in a fixed order, so the result
is the same on every CPU to the last bit, where a product of matrices is summed in each CPU's own
order. Weights that differ in the last bit round to other codes, and artifacts would depend on the
machine that exported them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Vectors that are transformed together: they stay in a core's cache.
BLOCK = 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R = diag(signs) (rest x H): x is the Kronecker product.

    H is the normalized Hadamard matrix of the largest power of two that divides the size.

    Attributes:
        signs: float32 [size], 1 or -1.
        rest: float32 [odd, odd], orthogonal, for the size's odd factor.
    """

    signs: np.ndarray
    rest: np.ndarray

    @classmethod
    def random(cls, size: int, generator: np.random.Generator) -> Rotation:
        """Draw the signs, and for sizes that are not powers of two the orthogonal rest."""
        odd = size // (size & -size)
        rest, _ = np.linalg.qr(generator.standard_normal((odd, odd)))
        signs = generator.choice([-1.0, 1.0], size)
        return cls(signs.astype(np.float32), rest.astype(np.float32))

    def matrix(self) -> np.ndarray:
        """R itself: float32 [size, size]."""
        return self.of_rows(np.eye(len(self.signs), dtype=np.float32))

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Multiply rows by R: float32 [rows, size], like `values`."""
        result = np.empty(values.shape, np.float32)
        for start in range(0, len(values), BLOCK):
            # Transposed block by block: for a whole matrix that takes longer than the transform.
            rows = slice(start, start + BLOCK)
            signed = np.multiply(values[rows].T, self.signs[:, None], order="C")
            result[rows] = self._transform(signed).T
        return result

    def of_columns(self, values: np.ndarray) -> np.ndarray:
        """Multiply columns by R transposed: float32 [size, columns], like `values`."""
        result = np.empty(values.shape, np.float32)
        for start in range(0, values.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            signed = np.multiply(values[:, columns], self.signs[:, None], order="C")
            result[:, columns] = self._transform(signed)
        return result

    def _transform(self, values: np.ndarray) -> np.ndarray:
        """(rest x H) transposed @ values; `values`, contiguous, is overwritten."""
        odd = len(self.rest)
        power, width = len(values) // odd, values.shape[1]
        other = np.empty_like(values)
        distance = 1
        while distance < power:
            pairs = values.reshape(-1, 2, distance * width)
            results = other.reshape(pairs.shape)
            np.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=results[:, 1])
            values, other = other, values
            distance *= 2
        parts = values.reshape(odd, power * width)
        mixed = other.reshape(parts.shape)
        np.multiply(parts[0], self.rest[0][:, None], out=mixed)
        for part, weights in zip(parts[1:], self.rest[1:], strict=True):
            mixed += part * weights[:, None]
        other *= np.float32(1 / np.sqrt(power))
        return other
