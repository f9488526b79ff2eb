"""Rotate the residual stream and attention's values, so that no channel is an outlier.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406): once the RMSNorms' gains are folded into
the matrices that follow, the residual stream can be multiplied by any orthogonal matrix. Matrices
that write it are multiplied by that matrix, matrices that read it by its transpose. A randomized
Hadamard matrix (hadamard.py) spreads an outlier channel over all channels. The same works for each
head's values between v_proj and o_proj. The only cost at run time is one product per text at the
very end, and none if heads alone are rotated.
"""

from __future__ import annotations

import numpy as np

from .fold import LAYER, PRODUCERS
from .hadamard import Rotation
from .source import DerivedWeights, WeightSource

# Matrices that read the residual stream, each with the norm it reads through.
NORMS = {
    consumer: producer for consumer, producer in PRODUCERS.items() if producer.endswith("layernorm")
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class RotatedHeads(DerivedWeights):
    """A weight source whose attention's values are rotated, head by head.

    The function stays the same, and so does every tensor's shape: any software can run it.

    Args:
        source: The original weights.
        rotation: A rotation of size head_dim.
    """

    def __init__(self, source: WeightSource, rotation: Rotation) -> None:
        super().__init__(source)
        self._rotation = rotation

    @classmethod
    def seeded(cls, source: WeightSource, seed: int = 0) -> RotatedHeads:
        """Rotate by a randomized Hadamard matrix."""
        return cls(source, Rotation.random(source.spec.head_dim, np.random.default_rng(seed)))

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        if name.endswith(".self_attn.v_proj.bias"):
            whole = self._source.read_fp32(name).reshape(-1, self.spec.head_dim)
            return self._rotation.of_rows(whole).reshape(-1)[rows]
        if name.endswith(".self_attn.v_proj.weight"):
            whole = self._source.read_fp32(name)
            heads = whole.reshape(-1, self.spec.head_dim, whole.shape[1])
            return np.concatenate([self._rotation.of_columns(head) for head in heads])[rows]
        values = self._source.read_fp32(name, rows)
        if name.endswith(".self_attn.o_proj.weight"):
            heads = values.reshape(-1, self.spec.head_dim)
            values = self._rotation.of_rows(heads).reshape(values.shape)
        return values


class RotatedWeights(DerivedWeights):
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
        generator = np.random.default_rng(seed)
        self._stream = Rotation.random(source.spec.hidden_size, generator)
        heads = Rotation.random(source.spec.head_dim, generator)
        super().__init__(RotatedHeads(source, heads))
        self.output_rotation = self._stream.matrix().T * source.read_fp32("norm.weight")

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        if name == "embed_tokens.weight":
            return self._stream.of_rows(self._source.read_fp32(name, rows))
        if name == "norm.weight":
            return np.ones_like(self._source.read_fp32(name, rows))
        if name.endswith(".self_attn.o_proj.bias"):
            return self._stream.of_rows(self._source.read_fp32(name)[None])[0, rows]
        match = LAYER.fullmatch(name)
        layer, part = match.groups() if match else ("", "")
        if part in NORMS.values():
            return np.ones_like(self._source.read_fp32(name, rows))
        values = self._source.read_fp32(name, rows if part not in WRITERS else slice(None))
        if part in NORMS:
            return self._stream.of_rows(values * self._gains(layer, part))
        if part in WRITERS:
            return self._stream.of_columns(values)[rows]
        return values

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no for the final norm's output without gains: float32 [hidden]."""
        row = self._source.answer_row(yes, no) * self._source.read_fp32("norm.weight")
        return self._stream.of_rows(row[None])[0]

    def _gains(self, layer: str, part: str) -> np.ndarray:
        return self._source.read_fp32(f"{layer}.{NORMS[part]}.weight")
