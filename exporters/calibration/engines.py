"""Engines that run calibration texts and round matrices: onnxruntime and numpy, or torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeviceError, InputError, require
from ...quantize import gptq
from ...quantize.formats import Format
from ...quantize.schemes import QuantizedTensor
from ...quantize.source import DequantizedWeights, WeightSource
from ..graph.initializers import QuantizedMatrices
from ..graph.ort_dialect import OrtDialect
from ..graph.precision import PRECISIONS
from ..graph.qwen3 import Design
from .layerwise import Segment
from .moments import measure_moments

if TYPE_CHECKING:
    from .torch_segment import TorchSegment

DEVICES = ("cpu", "cuda")


class Engine(ABC):
    """Runs segments of layers, and quantizes what they lead to.

    Args:
        source: The weights.
        formats: The projections' formats.

    Attributes:
        rounding: `quantize.gptq`, or its like on the engine's own arrays.
    """

    rounding: Any

    def __init__(self, source: WeightSource, formats: Mapping[str, Format]) -> None:
        self._source, self._formats = source, formats

    @abstractmethod
    def segment(
        self, layer: int, stage: int, done: Mapping[str, QuantizedTensor]
    ) -> AbstractContextManager[Segment | TorchSegment]:
        """Open a segment, with the layer's projections that are quantized already."""

    @abstractmethod
    def moments(
        self, inputs: Sequence[np.ndarray], originals: Sequence[np.ndarray], last: int
    ) -> tuple[Any, Any]:
        """`moments.measure_moments`, in the engine's own arrays."""

    def read(self, name: str) -> Any:
        """A projection's weights, float32 [out, in], as the engine's own array."""
        return self._source.read_fp32(f"{name}.weight")

    def quantize(
        self,
        names: Sequence[str],
        inputs: Sequence[np.ndarray],
        originals: Sequence[np.ndarray],
        last: int,
    ) -> dict[str, QuantizedTensor]:
        """Quantize projections that share their inputs.

        Args:
            names: The projections.
            inputs: The quantized model's inputs, float32 [tokens, in] for each text.
            originals: The original model's, for GPTAQ; empty for GPTQ.
            last: How often a text's last token counts.

        Raises:
            CheckpointError: The inputs are not finite, or their Hessian cannot be inverted.
        """
        hessian, cross = self.moments(inputs, originals, last)
        curvature = self.rounding.Curvature(hessian)
        del hessian
        done = {}
        for name in names:
            weight = self.read(name)
            if cross is not None:
                weight = curvature.shifted(weight, cross)
            done[name] = self.rounding.quantize_gptq(weight, curvature, self._formats[name].scheme)
        return done


def open_engine(
    device: str, source: WeightSource, formats: Mapping[str, Format], folder: Path
) -> Engine:
    """Open the device's engine.

    Args:
        device: "cpu" or "cuda".
        source: The weights.
        formats: The projections' formats.
        folder: Where a segment's graph may be written while it runs.

    Raises:
        InputError, DeviceError, MissingPackageError: See `check_device`.
    """
    check_device(device)
    if device == "cpu":
        return CpuEngine(source, formats, folder)
    from .torch_engine import TorchEngine

    return TorchEngine(source, formats, device)


def check_device(device: str) -> None:
    """Check that calibration can run on a device.

    Raises:
        InputError: The device has another name.
        DeviceError: torch has no CUDA device here.
        MissingPackageError: torch is not installed, for "cuda".
    """
    if device not in DEVICES:
        raise InputError(f"device should be one of {', '.join(DEVICES)}, found {device!r}")
    if device == "cuda" and not require("torch", "torch").cuda.is_available():
        raise DeviceError("torch has no CUDA device here: calibrate with `device` cpu")


def _has_product(format: Format) -> bool:
    """Whether a segment multiplies by a format's codes; if not, by the values they stand for.

    Only weights in groups: 8-bit activations would be made by the operator before the segment,
    with scales that the segment does not get. No graph has a product of NF4.
    """
    scheme = format.scheme
    return scheme.group_size is not None and not format.activations and not scheme.nf4


class CpuEngine(Engine):
    """onnxruntime's products of segments, and numpy's rounding.

    Matrices that are quantized in groups are multiplied by the graph's operators, others
    dequantized.

    Args:
        source: The weights.
        formats: The projections' formats.
        folder: Where a segment's graph may be written while it runs.
    """

    rounding = gptq

    def __init__(self, source: WeightSource, formats: Mapping[str, Format], folder: Path) -> None:
        super().__init__(source, formats)
        self._design = Design(source, OrtDialect(), PRECISIONS["fp32"])
        self._folder = folder

    def segment(self, layer: int, stage: int, done: Mapping[str, QuantizedTensor]) -> Segment:
        """Open a segment: see `Engine`."""
        if all(_has_product(self._formats[name]) for name in done):
            formats = {name: self._formats[name] for name in done}
            precision = replace(self._design.precision, formats=formats)
            matrices = QuantizedMatrices(done.__getitem__)
            design = replace(self._design, precision=precision, matrices=matrices)
        else:
            design = replace(self._design, weights=DequantizedWeights(self._source, done))
        return Segment(design, layer, self._folder, stage)

    def moments(
        self, inputs: Sequence[np.ndarray], originals: Sequence[np.ndarray], last: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Second moments of the inputs."""
        return measure_moments(inputs, originals, last)
