"""Search each group's range for the least squared error, without calibration.

Each group tries narrower ranges, which clip a little but have finer steps, and keeps the one with
the least squared error. With limited pairs it also tries wider ranges.
"""

from __future__ import annotations

import numpy as np

from .pairs import SHARES as WIDER_SHARES
from .rtn import quantize_rtn
from .schemes import QuantizedTensor, QuantScheme

# The fractions of a group's full range to try.
SHARES = np.linspace(1.0, 0.6, 17, dtype=np.float32)[1:]
CHUNK_VALUES = 1 << 22


def quantize_mse(
    weight: np.ndarray, scheme: QuantScheme, importance: np.ndarray | None = None
) -> QuantizedTensor:
    """Round to nearest within each group's best range.

    Args:
        weight: float32 [out, in].
        scheme: The quantization scheme.
        importance: float32 [in], the weight of each input's squared error, such as the mean square
            of the activations; uniform by default.
    """
    step = max(1, CHUNK_VALUES // weight.shape[1])
    parts = [
        _quantize(weight[start : start + step], scheme, importance)
        for start in range(0, len(weight), step)
    ]
    return QuantizedTensor(
        scheme,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zero_points for part in parts]),
    )


def _quantize(
    weight: np.ndarray, scheme: QuantScheme, importance: np.ndarray | None
) -> QuantizedTensor:
    best = quantize_rtn(weight, scheme)
    codes, scales, zeros = best.codes.copy(), best.scales.copy(), best.zero_points.copy()
    errors = _errors(best, weight, importance)
    for share in (*SHARES, *(WIDER_SHARES if scheme.limits_pairs else ())):
        trial = quantize_rtn(weight, scheme, share=float(share))
        trial_errors = _errors(trial, weight, importance)
        better = trial_errors < errors
        errors = np.where(better, trial_errors, errors)
        scales = np.where(better, trial.scales, scales)
        zeros = np.where(better, trial.zero_points, zeros)
        columns = np.repeat(better, scheme.group_size or weight.shape[1], axis=1)
        codes = np.where(columns[:, : weight.shape[1]], trial.codes, codes)
    return QuantizedTensor(scheme, codes, scales, zeros)


def _errors(
    tensor: QuantizedTensor, weight: np.ndarray, importance: np.ndarray | None
) -> np.ndarray:
    """Each group's summed squared error: float32 [out, groups]."""
    squared = (tensor.dequantize() - weight) ** 2
    if importance is not None:
        squared *= importance
    size = tensor.scheme.group_size or weight.shape[1]
    return np.add.reduceat(squared, np.arange(0, weight.shape[1], size), axis=1)
