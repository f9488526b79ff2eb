"""Rotate the residual stream and attention's values, so that no channel is an outlier.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406): once the RMSNorms' gains are folded into
the matrices that follow, the residual stream can be multiplied by any orthogonal matrix. Matrices
that write it are multiplied by that matrix, matrices that read it by its transpose. A randomized
Hadamard matrix spreads an outlier channel over all channels. The same works for each head's values
between v_proj and o_proj. The only cost at run time is one product per text at the very end, and
none if heads alone are rotated.
"""

from __future__ import annotations

import numpy as np

from ..checkpoint.products import multiply
from ..checkpoint.spec import ModelSpec
from .fold import LAYER, PRODUCERS
from .source import WeightSource

# Matrices that read the residual stream, each with the norm it reads through.
NORMS = {
    consumer: producer for consumer, producer in PRODUCERS.items() if producer.endswith("layernorm")
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class RotatedHeads:
    """A weight source whose attention's values are rotated, head by head.

    The function stays the same, and so does every tensor's shape: any software can run it.

    Args:
        source: The original weights.
        rotation: float32 [head_dim, head_dim], orthogonal.
    """

    def __init__(self, source: WeightSource, rotation: np.ndarray) -> None:
        self._source = source
        self._rotation = rotation
        self.spec: ModelSpec = source.spec
        self.output_rotation = source.output_rotation

    @classmethod
    def seeded(cls, source: WeightSource, seed: int = 0) -> RotatedHeads:
        """Rotate by a randomized Hadamard matrix: see `orthogonal`."""
        return cls(source, orthogonal(source.spec.head_dim, np.random.default_rng(seed)))

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        if name.endswith(".self_attn.v_proj.bias"):
            whole = self._source.read_fp32(name).reshape(-1, self.spec.head_dim)
            return multiply(whole, self._rotation).reshape(-1)[rows]
        if name.endswith(".self_attn.v_proj.weight"):
            whole = self._source.read_fp32(name)
            heads = whole.reshape(-1, self.spec.head_dim, whole.shape[1])
            return np.concatenate([_multiply_columns(self._rotation, head) for head in heads])[rows]
        values = self._source.read_fp32(name, rows)
        if name.endswith(".self_attn.o_proj.weight"):
            heads = values.reshape(-1, self.spec.head_dim)
            values = multiply(heads, self._rotation).reshape(values.shape)
        return values

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no: float32 [hidden]."""
        return self._source.answer_row(yes, no)


class RotatedWeights:
    """A weight source that computes the same function in a rotated basis.

    The vectors must be in the checkpoint's own basis, so the final norm's gains cannot be folded
    away. They read as ones; `output_rotation` rotates the final norm's output back and applies the
    gains. For a reranker, the head rows are multiplied by it once instead.

    Args:
        source: The original weights, not rotated themselves.
        seed: Seed of the random signs and, for sizes that are not powers of two, of the random
            orthogonal part.
    """

    def __init__(self, source: WeightSource, seed: int = 0) -> None:
        self.spec: ModelSpec = source.spec
        generator = np.random.default_rng(seed)
        self._stream = orthogonal(self.spec.hidden_size, generator)
        self._source = RotatedHeads(source, orthogonal(self.spec.head_dim, generator))
        gains = source.read_fp32("norm.weight")
        self.output_rotation: np.ndarray | None = self._stream.T * gains

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        if name == "embed_tokens.weight":
            return multiply(self._source.read_fp32(name, rows), self._stream)
        if name == "norm.weight":
            return np.ones_like(self._source.read_fp32(name, rows))
        if name.endswith(".self_attn.o_proj.bias"):
            return multiply(self._source.read_fp32(name)[None], self._stream)[0, rows]
        match = LAYER.fullmatch(name)
        layer, part = match.groups() if match else ("", "")
        if part in NORMS.values():
            return np.ones_like(self._source.read_fp32(name, rows))
        values = self._source.read_fp32(name, rows if part not in WRITERS else slice(None))
        if part in NORMS:
            return multiply(values * self._gains(layer, part), self._stream)
        if part in WRITERS:
            return _multiply_columns(self._stream[:, rows], values)
        return values

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no for the final norm's output without gains: float32 [hidden]."""
        assert self.output_rotation is not None
        return multiply(self._source.answer_row(yes, no)[None], self.output_rotation.T)[0]

    def _gains(self, layer: str, part: str) -> np.ndarray:
        return self._source.read_fp32(f"{layer}.{NORMS[part]}.weight")


def _multiply_columns(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Transposed matrix @ values, as `multiply`: float32 [out, columns], contiguous."""
    return np.ascontiguousarray(multiply(values.T, matrix).T)


def orthogonal(size: int, generator: np.random.Generator) -> np.ndarray:
    """A randomized Hadamard matrix, as far as the size allows: float32 [size, size].

    It is the Kronecker product of a random orthogonal matrix and the Hadamard matrix of the largest
    power of two that divides the size, with random signs on its rows.
    """
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest, _ = np.linalg.qr(generator.standard_normal((size // power, size // power)))
    signs = generator.choice([-1.0, 1.0], size)
    matrix = np.kron(rest, hadamard / np.sqrt(power)) * signs[:, None]
    return matrix.astype(np.float32)
