"""Search each group's range for the least squared error, without calibration.

Each group tries narrower ranges, which clip a little but have finer steps, and keeps the one with
the least squared error. With limited pairs it also tries wider ranges.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .pairs import SHARES as WIDER_SHARES
from .rtn import Groups, quantize_rtn
from .schemes import QuantizedTensor, QuantScheme

# The fractions of a group's full range to try.
SHARES = np.linspace(1.0, 0.6, 17, dtype=np.float32)[1:]
# Rows are searched in ranges that stay in a core's cache.
CHUNK_VALUES = 1 << 16


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
    search = _search_pairs if scheme.limits_pairs else _search
    step = max(1, CHUNK_VALUES // weight.shape[1])
    chunks = [weight[start : start + step] for start in range(0, len(weight), step)]
    # numpy computes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda chunk: search(chunk, scheme, importance), chunks))
    return QuantizedTensor.concatenate(parts)


def _search(
    weight: np.ndarray, scheme: QuantScheme, importance: np.ndarray | None
) -> QuantizedTensor:
    groups = Groups.of(weight, scheme)

    def squared_errors(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        values = scheme.decode(groups.round(scales, zeros), zeros[:, :, None])
        values *= scales[:, :, None]
        values -= groups.values
        return _sum(np.square(values, out=values).reshape(len(values), -1), scheme, importance)

    scales, zeros = groups.ranges(1.0)
    errors = squared_errors(scales, zeros)
    for share in SHARES:
        trial_scales, trial_zeros = groups.ranges(float(share))
        trial_errors = squared_errors(trial_scales, trial_zeros)
        better = trial_errors < errors
        errors = np.where(better, trial_errors, errors)
        scales = np.where(better, trial_scales, scales)
        zeros = np.where(better, trial_zeros, zeros)
    return groups.quantize(scales, zeros)


def _search_pairs(
    weight: np.ndarray, scheme: QuantScheme, importance: np.ndarray | None
) -> QuantizedTensor:
    """The same where rounding a code depends on its neighbour: one group an output row."""
    best = quantize_rtn(weight, scheme)
    codes, scales = best.codes, best.scales
    errors = _sum((best.dequantize() - weight) ** 2, scheme, importance)
    for share in (*SHARES, *WIDER_SHARES):
        trial = quantize_rtn(weight, scheme, share=float(share))
        trial_errors = _sum((trial.dequantize() - weight) ** 2, scheme, importance)
        better = trial_errors < errors
        errors = np.where(better, trial_errors, errors)
        scales = np.where(better, trial.scales, scales)
        codes = np.where(better, trial.codes, codes)
    return QuantizedTensor(scheme, codes, scales, best.zero_points)


def _sum(squared: np.ndarray, scheme: QuantScheme, importance: np.ndarray | None) -> np.ndarray:
    """Each group's summed squared error: float32 [out, groups]; `squared` is overwritten."""
    if importance is not None:
        squared[:, : len(importance)] *= importance
    size = scheme.group_size or squared.shape[1]
    return np.add.reduceat(squared, np.arange(0, squared.shape[1], size), axis=1)
