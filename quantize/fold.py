"""Fold channel factors into the weights on both sides, which leaves the function unchanged.

An RMSNorm's output can be divided by one factor per channel in the norm's gains, and multiplied by
it in the matrices that read it. The same holds between the rows of v_proj and o_proj, through
attention, and between the rows of up_proj and down_proj, through the SwiGLU.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..checkpoint.spec import ModelSpec
from .source import DerivedWeights, WeightSource

LAYER = re.compile(r"(layers\.\d+)\.(.+)\.weight")
# The only bias that factors apply to.
VALUE_BIAS = ".self_attn.v_proj.bias"
# The norm or projection that makes a tensor, to the matrices that read it.
CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
PRODUCERS = {
    consumer: producer for producer, consumers in CONSUMERS.items() for consumer in consumers
}

# Maps (layer, producer) to the factors of the producer's output channels: float32 [channels].
Factors = Callable[[str, str], np.ndarray]


class FoldedWeights(DerivedWeights):
    """A weight source with channel factors folded in.

    Args:
        source: The original weights.
        factors: The factors that each producer's channels are divided by.
    """

    def __init__(self, source: WeightSource, factors: Factors) -> None:
        super().__init__(source)
        self._factors = factors

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read a tensor, or a range of its rows: float32."""
        values = self._source.read_fp32(name, rows)
        if name.endswith(VALUE_BIAS):
            layer = name.removesuffix(VALUE_BIAS)
            return values / self._factors(layer, "self_attn.v_proj")[rows]
        match = LAYER.fullmatch(name)
        if match is None:
            return values
        layer, part = match.groups()
        if part in PRODUCERS:
            factors = self._factors(layer, PRODUCERS[part])
            values = values * expand_kv(self.spec, part, factors)
        if part in CONSUMERS:
            factors = self._factors(layer, part)[rows]
            values = values / (factors if values.ndim == 1 else factors[:, None])
        return values

    def rounded(self, dtype: np.dtype) -> FoldedWeights:
        """Adjust the factors so that a 16-bit dtype represents every norm's gains exactly.

        Gains are divided, and weights multiplied, by the same adjusted factor. So storing the gains
        in 16 bits loses nothing.
        """

        def factors(layer: str, producer: str) -> np.ndarray:
            original = self._factors(layer, producer)
            if not producer.endswith("layernorm"):
                return original
            gains = self._source.read_fp32(f"{layer}.{producer}.weight")
            stored = (gains / original).astype(dtype).astype(np.float32)
            usable = (stored != 0) & np.isfinite(stored)
            return np.where(usable, gains / np.where(usable, stored, 1), original)

        return FoldedWeights(self._source, factors)


def expand_kv(spec: ModelSpec, consumer: str, channels: np.ndarray) -> np.ndarray:
    """A producer's channels as its consumer reads them: o_proj, once per query head."""
    if consumer != "self_attn.o_proj":
        return channels
    heads = channels.reshape(spec.num_kv_heads, 1, spec.head_dim)
    return np.repeat(heads, spec.num_heads // spec.num_kv_heads, axis=1).reshape(-1)


def reduce_kv(spec: ModelSpec, consumer: str, channels: np.ndarray) -> np.ndarray:
    """A consumer's channels as its producer's: the maximum over a value head's query heads."""
    if consumer != "self_attn.o_proj":
        return channels
    return channels.reshape(spec.num_kv_heads, -1, spec.head_dim).max(axis=1).reshape(-1)
