"""Quantize a checkpoint's matrices, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ...quantize.mse import quantize_mse
from ...quantize.rtn import quantize_rtn
from ...quantize.smoothquant import balanced
from ...quantize.source import WeightSource
from ...weights import Weights
from ..onnx.formats import Format, matrices
from ..onnx.gptq_awq import quantize_layers, scale_layers
from .methods import Plan, numpy_dtype
from .packing import (
    Parts,
    bitsandbytes_parts,
    fp8_parts,
    gptq_parts,
    int8_parts,
    packed_parts,
)

# A function from a matrix's name, without ".weight", to its stored tensors.
Quantize = Callable[[str], Parts]


def apply_plan(
    weights: Weights,
    plan: Plan,
    rows: Sequence[np.ndarray],
    layers: Path,
    advance: Callable[[], None],
) -> tuple[WeightSource, Quantize]:
    """Prepare the tensors of a quantized checkpoint.

    Nothing is rotated: the stream would have to be rotated back after the final norm, and no
    server's model has a matrix there. Scaling factors fold into norms and matrices completely.

    Args:
        weights: The source.
        plan: How to quantize it.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        layers: Where GPTQ and AWQ keep finished layers: see `kept_layers`.
        advance: Called after each layer that GPTQ or AWQ has finished.

    Returns:
        (the tensors that are not quantized, the function that quantizes a matrix).
    """
    scheme, dtype = plan.scheme, numpy_dtype(plan.dtype)
    formats = dict.fromkeys(matrices(weights.spec), Format(scheme))

    def read(source: WeightSource, name: str) -> np.ndarray:
        return check_finite(source, f"{name}.weight", source.read_fp32(f"{name}.weight"))

    match plan.name:
        case "gptq":
            calibrated = quantize_layers(weights, weights, formats, rows, layers, advance)
            return weights, lambda name: gptq_parts(calibrated(name))
        case "awq":
            folded, importance = scale_layers(weights, weights, formats, rows, layers, advance)
            scaled = folded.rounded(dtype)
            return scaled, lambda name: packed_parts(
                quantize_mse(read(scaled, name), scheme, importance(name))
            )
        case "w8a8":
            smooth = balanced(weights).rounded(dtype)
            return smooth, lambda name: int8_parts(quantize_rtn(read(smooth, name), scheme))
        case "fp8":
            return weights, lambda name: fp8_parts(read(weights, name), scheme)
        case _:
            return weights, lambda name: bitsandbytes_parts(read(weights, name).astype(dtype), plan)


def check_finite(source: WeightSource, name: str, values: np.ndarray) -> np.ndarray:
    """Return a tensor's values, as read, rounded or quantized, if all are finite.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    # The floats of ml_dtypes have the kind "V".
    if values.dtype.kind in "fV" and not np.isfinite(values.astype(np.float32)).all():
        raise CheckpointError(
            f"{source.spec.source.folder}: tensor {name} holds NaN or infinity, or becomes "
            f"infinite in {values.dtype}; download the checkpoint again"
        )
    return values
