"""Outlier channels moved from activations into weights, judged by the weights alone.

SmoothQuant (arXiv:2211.10438, eq. 4 at alpha 0.5) divides each channel of an activation by
sqrt(largest activation / largest weight) and multiplies the weights that read it. It takes the
activations from calibration. Here they are estimated: behind an RMSNorm a channel is about as large
as the norm's gain, and behind a projection about as large as the projection's row. So nothing has
to be run, and a channel that the weights make large is found whether or not a text shows it.

The factors go into the norm's gains, v_proj's rows and up_proj's rows: the function is the same.
"""

from __future__ import annotations

import re

import numpy as np

from ..spec import ModelSpec
from .source import WeightSource

LAYER = re.compile(r"(layers\.\d+)\.(.+)\.weight")
ATTENTION, MLP = "input_layernorm", "post_attention_layernorm"
# Readers of each norm.
READERS = {
    "self_attn.q_proj": ATTENTION,
    "self_attn.k_proj": ATTENTION,
    "self_attn.v_proj": ATTENTION,
    "mlp.gate_proj": MLP,
    "mlp.up_proj": MLP,
}
# Who reads what a projection gives, channel by channel.
CHAINS = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}


class BalancedWeights:
    """A source whose activations have no outlier channels that its weights show.

    Args:
        source: Where the weights come from.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.spec: ModelSpec = source.spec
        self.output_rotation = source.output_rotation
        self._factors: dict[tuple[str, str], np.ndarray] = {}

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows: float32."""
        values = self._source.read_fp32(name, rows)
        match = LAYER.fullmatch(name)
        if match is None:
            return values
        layer, part = match.groups()
        if part in (ATTENTION, MLP):
            return values / self._norm_factors(layer, part)[rows]
        if part in READERS:
            values = values * self._norm_factors(layer, READERS[part])
        if part in CHAINS:
            values = values / self._chain_factors(layer, part)[rows, None]
        for writer, reader in CHAINS.items():
            if part == reader:
                values = values * self._widened(self._chain_factors(layer, writer), reader)
        return values

    def lm_head_rows(self, ids: list[int]) -> np.ndarray:
        """Rows of the head: float32 [n, hidden]."""
        return self._source.lm_head_rows(ids)

    def _norm_factors(self, layer: str, norm: str) -> np.ndarray:
        """What a norm's gains are divided by: float32 [hidden]."""
        key = (layer, norm)
        if key not in self._factors:
            readers = [part for part, read in READERS.items() if read == norm]
            largest = np.max([self._largest_columns(layer, part) for part in readers], axis=0)
            gains = np.abs(self._source.read_fp32(f"{layer}.{norm}.weight"))
            self._factors[key] = _factors(gains, largest)
        return self._factors[key]

    def _chain_factors(self, layer: str, writer: str) -> np.ndarray:
        """What a projection's rows are divided by: float32 [out]."""
        key = (layer, writer)
        if key not in self._factors:
            sizes = self._row_sizes(layer, writer)
            if writer == "mlp.up_proj":
                sizes = sizes * self._row_sizes(layer, "mlp.gate_proj")
            reader = CHAINS[writer]
            largest = self._narrowed(self._largest_columns(layer, reader), reader)
            self._factors[key] = _factors(sizes, largest)
        return self._factors[key]

    def _row_sizes(self, layer: str, part: str) -> np.ndarray:
        """About how large each output of a projection is: float32 [out]."""
        gains = self._source.read_fp32(f"{layer}.{READERS[part]}.weight")
        return np.linalg.norm(self._source.read_fp32(f"{layer}.{part}.weight") * gains, axis=1)

    def _largest_columns(self, layer: str, part: str) -> np.ndarray:
        return np.abs(self._source.read_fp32(f"{layer}.{part}.weight")).max(axis=0)

    def _narrowed(self, columns: np.ndarray, reader: str) -> np.ndarray:
        """The largest of the query heads that share a key-value head's channel."""
        if reader != "self_attn.o_proj":
            return columns
        spec = self.spec
        return columns.reshape(spec.num_kv_heads, -1, spec.head_dim).max(axis=1).reshape(-1)

    def _widened(self, channels: np.ndarray, reader: str) -> np.ndarray:
        """Each key-value head's channels for all query heads that share it."""
        if reader != "self_attn.o_proj":
            return channels
        spec = self.spec
        heads = channels.reshape(spec.num_kv_heads, 1, spec.head_dim)
        return np.repeat(heads, spec.num_heads // spec.num_kv_heads, axis=1).reshape(-1)


def _factors(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Square root of activation by weight, around 1; 1 where a channel is not used."""
    used = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations)
    factors[used] = np.sqrt(activations[used] / weights[used])
    if used.any():
        factors[used] /= np.exp(np.log(factors[used]).mean())
    return factors
