"""The residual stream and the attention's values turned, so that no channel stands out.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406): with the RMSNorms' gains folded into the
matrices behind them, the residual stream may be multiplied by any orthogonal matrix, if what writes
it is multiplied too and what reads it by the transpose. A randomized Hadamard matrix spreads an
outlier channel over all channels. The same holds for each head's values between v_proj and o_proj.
Nothing is left to do at run time but one product a text at the very end.
"""

from __future__ import annotations

import numpy as np

from ..spec import ModelSpec
from .fold import LAYER, MAKERS
from .source import WeightSource

# What reads the residual stream, to the norm through which it does.
NORMS = {reader: maker for reader, maker in MAKERS.items() if maker.endswith("layernorm")}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class RotatedWeights:
    """A source that computes the same function in another basis.

    The final norm's gain cannot be folded away: the vectors are to be in the checkpoint's own
    basis. So `output_rotation` turns the final norm's output, whose gains read as ones, back and
    applies them; a reranker's head rows are multiplied by it once instead.

    Args:
        source: Where the weights come from; not rotated itself.
        seed: Of the random signs and, for sizes that are not powers of two, the orthogonal part.
    """

    def __init__(self, source: WeightSource, seed: int = 0) -> None:
        self._source = source
        self.spec: ModelSpec = source.spec
        generator = np.random.default_rng(seed)
        self._stream = orthogonal(self.spec.hidden_size, generator)
        self._head = orthogonal(self.spec.head_dim, generator)
        gains = source.read_fp32("norm.weight")
        self.output_rotation: np.ndarray | None = self._stream.T * gains

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows: float32."""
        if name == "embed_tokens.weight":
            return self._source.read_fp32(name, rows) @ self._stream
        if name == "norm.weight":
            return np.ones_like(self._source.read_fp32(name, rows))
        if name.endswith(".self_attn.v_proj.bias"):
            whole = self._source.read_fp32(name).reshape(-1, self.spec.head_dim)
            return (whole @ self._head).reshape(-1)[rows]
        if name.endswith(".self_attn.o_proj.bias"):
            return (self._source.read_fp32(name) @ self._stream)[rows]
        match = LAYER.fullmatch(name)
        layer, part = match.groups() if match else ("", "")
        if part in NORMS.values():
            return np.ones_like(self._source.read_fp32(name, rows))
        if part == "self_attn.v_proj":
            whole = self._source.read_fp32(name)
            heads = whole.reshape(-1, self.spec.head_dim, whole.shape[1])
            turned = np.matmul(self._head.T, heads).reshape(whole.shape)
            return (turned[rows] * self._gains(layer, part)) @ self._stream
        values = self._source.read_fp32(name, rows if part not in WRITERS else slice(None))
        if part in NORMS:
            return (values * self._gains(layer, part)) @ self._stream
        if part == "self_attn.o_proj":
            heads = values.reshape(len(values), -1, self.spec.head_dim)
            values = np.matmul(heads, self._head).reshape(values.shape)
        if part in WRITERS:
            return self._stream[:, rows].T @ values
        return values

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no, which goes with the final norm's output without gains: [hidden]."""
        assert self.output_rotation is not None
        return self.output_rotation @ self._source.answer_row(yes, no)

    def _gains(self, layer: str, part: str) -> np.ndarray:
        return self._source.read_fp32(f"{layer}.{NORMS[part]}.weight")


def orthogonal(size: int, generator: np.random.Generator) -> np.ndarray:
    """A randomized Hadamard matrix, or as much of one as the size allows: float32 [size, size].

    The Kronecker product of the Hadamard matrix of the largest power of two that divides the size,
    a random orthogonal matrix of what is left, and random signs.
    """
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest, _ = np.linalg.qr(generator.standard_normal((size // power, size // power)))
    signs = generator.choice([-1.0, 1.0], size)
    matrix = np.kron(rest, hadamard / np.sqrt(power)) * signs[:, None]
    return matrix.astype(np.float32)
