"""Factors of channels, folded into the weights on both sides: the function stays the same.

What an RMSNorm hands on may be divided by a factor a channel in its gains, and multiplied by it in
the matrices that read it. So may what v_proj hands through attention to o_proj, and up_proj through
the SwiGLU to down_proj, in their rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..spec import ModelSpec
from .source import WeightSource

LAYER = re.compile(r"(layers\.\d+)\.(.+)\.weight")
# The one bias that a factor goes through.
VALUE_BIAS = ".self_attn.v_proj.bias"
# Who makes a tensor, and which matrices read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
MAKERS = {reader: maker for maker, readers in READERS.items() for reader in readers}

# (layer, maker) to the factors of the channels it makes: float32 [channels].
Factors = Callable[[str, str], np.ndarray]


class FoldedWeights:
    """A source with factors folded in.

    Args:
        source: Where the weights come from.
        factors: What each maker's channels are divided by.
    """

    def __init__(self, source: WeightSource, factors: Factors) -> None:
        self._source = source
        self._factors = factors
        self.spec: ModelSpec = source.spec
        self.output_rotation = source.output_rotation

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows: float32."""
        values = self._source.read_fp32(name, rows)
        if name.endswith(VALUE_BIAS):
            layer = name.removesuffix(VALUE_BIAS)
            return values / self._factors(layer, "self_attn.v_proj")[rows]
        match = LAYER.fullmatch(name)
        if match is None:
            return values
        layer, part = match.groups()
        if part in MAKERS:
            factors = self._factors(layer, MAKERS[part])
            values = values * widen(self.spec, part, factors)
        if part in READERS:
            factors = self._factors(layer, part)[rows]
            values = values / (factors if values.ndim == 1 else factors[:, None])
        return values

    def rounded(self, dtype: np.dtype) -> FoldedWeights:
        """The same, with factors that leave every norm gains which a 16-bit dtype holds exactly.

        Gains and weights are divided and multiplied by the same number, so that storing the gains
        in 16 bits costs nothing.
        """

        def factors(layer: str, maker: str) -> np.ndarray:
            found = self._factors(layer, maker)
            if not maker.endswith("layernorm"):
                return found
            gains = self._source.read_fp32(f"{layer}.{maker}.weight")
            stored = (gains / found).astype(dtype).astype(np.float32)
            used = (stored != 0) & np.isfinite(stored)
            return np.where(used, gains / np.where(used, stored, 1), found)

        return FoldedWeights(self._source, factors)

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """W_yes - W_no: float32 [hidden]."""
        return self._source.answer_row(yes, no)


def widen(spec: ModelSpec, reader: str, channels: np.ndarray) -> np.ndarray:
    """A maker's channels as its reader has them: o_proj reads a value head once a query head."""
    if reader != "self_attn.o_proj":
        return channels
    heads = channels.reshape(spec.num_kv_heads, 1, spec.head_dim)
    return np.repeat(heads, spec.num_heads // spec.num_kv_heads, axis=1).reshape(-1)


def narrow(spec: ModelSpec, reader: str, channels: np.ndarray) -> np.ndarray:
    """The other way: the largest of the query heads that share a value head's channel."""
    if reader != "self_attn.o_proj":
        return channels
    return channels.reshape(spec.num_kv_heads, -1, spec.head_dim).max(axis=1).reshape(-1)
