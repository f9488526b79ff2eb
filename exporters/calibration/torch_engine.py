"""Calibration on a GPU, in torch: see `engines`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ...quantize import torch_gptq
from ...quantize.formats import Format
from ...quantize.schemes import QuantizedTensor
from ...quantize.source import WeightSource
from .engines import Engine
from .moments import BLOCK, blocks, token_weights
from .torch_segment import TorchSegment


class TorchEngine(Engine):
    """A layer's segments and the rounding of its matrices, on a device of torch.

    Memory on the device holds a segment's matrices, a block of tokens, and one matrix with its
    Hessian.

    Args:
        source: The weights.
        formats: The projections' formats.
        device: The device.
    """

    rounding = torch_gptq

    def __init__(self, source: WeightSource, formats: Mapping[str, Format], device: str) -> None:
        super().__init__(source, formats)
        self._device = device

    def segment(self, layer: int, stage: int, done: Mapping[str, QuantizedTensor]) -> TorchSegment:
        """Open a segment: see `Engine`."""
        return TorchSegment(self._source, layer, stage, done, self._device)

    def read(self, name: str) -> torch.Tensor:
        """A projection's weights, float32 [out, in], on the device."""
        return torch.from_numpy(super().read(name)).to(self._device)

    def moments(
        self, inputs: Sequence[np.ndarray], originals: Sequence[np.ndarray], last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`moments.measure_moments` on the device."""
        size = inputs[0].shape[1]
        hessian = torch.zeros(size, size, device=self._device)
        cross = torch.zeros_like(hessian) if originals else None
        total = 0.0
        for texts in blocks(inputs, BLOCK):
            weights = token_weights([inputs[i] for i in texts], last)
            total += float((weights**2).sum())
            y = self._join(inputs, texts, weights)
            hessian.addmm_(y.T, y)
            if cross is not None:
                cross.addmm_((self._join(originals, texts, weights) - y).T, y)
        return hessian / total, None if cross is None else cross / total

    def _join(
        self, texts: Sequence[np.ndarray], numbers: Sequence[int], weights: np.ndarray
    ) -> torch.Tensor:
        rows = np.concatenate([texts[i] for i in numbers])
        return torch.from_numpy(rows).to(self._device) * torch.from_numpy(weights).to(self._device)
