"""A layer's segments in torch and fp32, for calibration on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional

from ...quantize.schemes import QuantizedTensor
from ...quantize.source import DequantizedWeights, WeightSource
from .moments import blocks

# Tokens on the device at once.
BLOCK = 16384
# The projections that read each segment's result.
READERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    (),
)
# The norms that each segment applies.
NORMS = (
    ("input_layernorm",),
    ("self_attn.q_norm", "self_attn.k_norm"),
    ("post_attention_layernorm",),
    (),
    (),
)


class TorchSegment:
    """`layerwise.Segment` on a device of torch: the same stages, arguments and results.

    Quantized projections are multiplied dequantized; activations are not rounded.

    Args:
        source: The weights.
        layer: The layer's number.
        stage: The input to compute, from 0, or `STAGES` for the layer's end.
        done: The layer's quantized projections, by name.
        device: The device.
    """

    def __init__(
        self,
        source: WeightSource,
        layer: int,
        stage: int,
        done: Mapping[str, QuantizedTensor],
        device: str,
    ) -> None:
        self._spec, self._layer, self._stage, self._device = source.spec, layer, stage, device
        self.names = [f"layers.{layer}.{part}" for part in READERS[stage]]
        self._tensors: dict[str, torch.Tensor] = {}
        weights = DequantizedWeights(source, done)
        for part in (*(READERS[stage - 1] if stage else ()), *NORMS[stage]):
            name = f"layers.{layer}.{part}"
            weight = torch.from_numpy(weights.read_fp32(f"{name}.weight"))
            self._tensors[f"{part}.weight"] = weight.to(device)
            if f"{name}.bias" in source.spec.tensor_shapes():
                bias = source.read_fp32(f"{name}.bias")
                self._tensors[f"{part}.bias"] = torch.from_numpy(bias).to(device)

    def __enter__(self) -> TorchSegment:
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors.clear()

    @torch.inference_mode()
    def run(
        self, rows: Sequence[np.ndarray], states: list[np.ndarray], inputs: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Run texts through the segment: see `layerwise.Segment.run`."""
        results: list[np.ndarray] = []
        for block in blocks(rows, BLOCK):
            sizes = [len(rows[i]) for i in block]
            stream = self._join([states[i][0] for i in block])
            x = self._join([inputs[i] for i in block]) if inputs else stream
            stream, x = self._compute(stream, x, sizes)
            for i, state in zip(block, stream.cpu().split(sizes), strict=True):
                states[i] = state.numpy()[None]
            if x is not None:
                results += [result.numpy() for result in x.cpu().split(sizes)]
        return results

    def _compute(
        self, stream: torch.Tensor, x: torch.Tensor, sizes: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        match self._stage:
            case 0:
                return stream, self._norm("input_layernorm", stream)
            case 1:
                return stream, self._attend(x, sizes)
            case 2:
                stream = stream + self._linear("self_attn.o_proj", x)
                return stream, self._norm("post_attention_layernorm", stream)
            case 3:
                gate = functional.silu(self._linear("mlp.gate_proj", x))
                return stream, gate * self._linear("mlp.up_proj", x)
            case _:
                return stream + self._linear("mlp.down_proj", x), None

    def _attend(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Attention within each text: [tokens, heads * head_dim]."""
        q = self._norm("self_attn.q_norm", self._heads("self_attn.q_proj", x))
        k = self._norm("self_attn.k_norm", self._heads("self_attn.k_proj", x))
        v = self._heads("self_attn.v_proj", x)
        cosines, sines = self._angles(max(sizes))
        results = []
        for text in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            count = len(text[0])
            rotated = [_rotate(t, cosines[:count], sines[:count]) for t in text[:2]]
            attended = functional.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (*rotated, text[2])),
                attn_mask=self._mask(count),
                is_causal=self._layer not in self._spec.masked_layers,
                enable_gqa=True,
            )
            results.append(attended[0].transpose(0, 1).reshape(count, -1))
        return torch.cat(results)

    def _mask(self, count: int) -> torch.Tensor | None:
        """The attention mask of a layer with a sliding window: bool [tokens, tokens]."""
        window = self._spec.window
        if window is None or self._layer not in self._spec.masked_layers:
            return None
        places = torch.arange(count, device=self._device)
        distance = places[:, None] - places
        return (distance >= 0) & (distance < window)

    def _heads(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(part, x).view(len(x), -1, self._spec.head_dim)

    def _linear(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(
            x, self._tensors[f"{part}.weight"], self._tensors.get(f"{part}.bias")
        )

    def _norm(self, part: str, x: torch.Tensor) -> torch.Tensor:
        gains = self._tensors[f"{part}.weight"]
        return functional.rms_norm(x, gains.shape, gains, self._spec.rms_norm_eps)

    def _angles(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [tokens, 1, head_dim / 2] each (RoFormer, arXiv:2104.09864)."""
        rope = self._spec.rope
        frequencies = torch.from_numpy(rope.frequencies(self._spec.head_dim)).to(self._device)
        angles = torch.arange(count, device=self._device)[:, None, None] * frequencies
        return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor

    def _join(self, texts: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(texts)).to(self._device)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
