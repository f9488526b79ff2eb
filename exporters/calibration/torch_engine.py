"""Calibration on a GPU, in torch: see `engines`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ...quantize.formats import Format
from ...quantize.schemes import QuantizedTensor
from ...quantize.source import WeightSource
from ...quantize.torch_gptq import Curvature, quantize_gptq
from .moments import BLOCK, blocks, token_weights
from .torch_segment import TorchSegment


class TorchEngine:
    """A layer's segments and the rounding of its matrices, on a device of torch.

    Memory on the device holds a segment's matrices, a block of tokens, and one matrix with its
    Hessian.

    Args:
        source: The weights.
        formats: The projections' formats.
        device: The device.
    """

    def __init__(self, source: WeightSource, formats: Mapping[str, Format], device: str) -> None:
        self._source, self._formats, self._device = source, formats, device

    def segment(self, layer: int, stage: int, done: Mapping[str, QuantizedTensor]) -> TorchSegment:
        """Open a segment: see `engines.Engine`."""
        return TorchSegment(self._source, layer, stage, done, self._device)

    @torch.inference_mode()
    def quantize(
        self,
        names: Sequence[str],
        inputs: Sequence[np.ndarray],
        originals: Sequence[np.ndarray],
        last: int,
    ) -> dict[str, QuantizedTensor]:
        """Quantize projections that share their inputs: see `engines.Engine`."""
        hessian, cross = self._moments(inputs, originals, last)
        curvature = Curvature(hessian)
        del hessian
        done = {}
        for name in names:
            weight = torch.from_numpy(self._source.read_fp32(f"{name}.weight")).to(self._device)
            if cross is not None:
                weight = curvature.shifted(weight, cross)
            done[name] = quantize_gptq(weight, curvature, self._formats[name].scheme)
        return done

    def _moments(
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
