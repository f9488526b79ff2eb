"""Quantize a checkpoint's matrices, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ...checkpoint.weights import Weights
from ...errors import CheckpointError
from ...quantize.formats import Format, matrices
from ...quantize.rotation import RotatedHeads
from ...quantize.rtn import quantize_rtn
from ...quantize.smoothquant import balanced
from ...quantize.source import WeightSource
from ..calibration.calibrate import calibrate
from .methods import Plan
from .packing import (
    Parts,
    bitsandbytes_parts,
    fp8_parts,
    gptq_parts,
    int8_parts,
    nf4_parts,
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
    device: str = "cpu",
) -> tuple[WeightSource, Quantize]:
    """Prepare the tensors of a quantized checkpoint.

    The residual stream is not rotated: it would have to be rotated back after the final norm, and
    no server's model has a matrix there. Rotated attention heads and scaling factors fold into
    norms and matrices completely.

    Args:
        weights: The source.
        plan: How to quantize it.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        layers: Where finished layers are kept: see `kept_layers`.
        advance: Called after each layer of a calibrated method; twice a layer if channels are
            scaled and errors compensated.
        device: Where a calibrated method runs the texts and rounds, "cpu" or "cuda".

    Returns:
        (the tensors that are not quantized, the function that quantizes a matrix).
    """
    scheme, dtype = plan.scheme, np.dtype(plan.dtype)
    source: WeightSource = RotatedHeads.seeded(weights) if plan.rotate_heads else weights
    formats = dict.fromkeys(matrices(weights.spec), Format(scheme))

    def read(source: WeightSource, name: str) -> np.ndarray:
        return check_finite(source, f"{name}.weight", source.read_fp32(f"{name}.weight"))

    if plan.is_calibrated:
        pack = {
            "bnb-nf4": partial(nf4_parts, plan=plan),
            "gptq": gptq_parts,
            "awq": packed_parts,
            "w8a8": int8_parts,
        }[plan.name]
        source, calibrated = calibrate(
            weights, source, plan.algorithm, formats, rows, layers, advance, dtype, device
        )
        return source, lambda name: pack(calibrated(name))
    match plan.name:
        case "w8a8":
            smooth = balanced(source).rounded(dtype)
            return smooth, lambda name: int8_parts(quantize_rtn(read(smooth, name), scheme))
        case "fp8":
            return source, lambda name: fp8_parts(read(source, name), scheme)
        case _:
            return source, lambda name: bitsandbytes_parts(read(source, name).astype(dtype), plan)


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
