"""Vectors: compared, shortened (MRL), and quantized to 8 bits or 1 bit per value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..texts.ranking import unit

# Precision to the version of its codes, which a change of rounding raises: a corpus has those of
# one version. In version 1 of 8 bits half of the codes of "int8" were one higher.
CODECS = {"float32": 1, "int8": 2, "uint8": 2, "binary": 1, "ubinary": 1}
VECTOR_PRECISIONS = tuple(CODECS)
# The precisions that need each value's range.
IN_8_BITS = ("int8", "uint8")
MRL_DIMS = (2048, 1024, 512, 256, 128, 64, 32)
# Significant digits of a stored range: enough for 255 steps.
DIGITS = 5


def shorten(vectors: np.ndarray, dim: int, *, unit_length: bool = True) -> np.ndarray:
    """The first `dim` values of each vector, normalized again (MRL, arXiv:2205.13147).

    Args:
        vectors: float32 [n, m].
        dim: Number of values to keep, at most m.
        unit_length: Whether the model's vectors have length 1; only these are normalized again.
    """
    cut = vectors[:, :dim]
    if not unit_length:
        return cut
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row-wise cosines of two [n, dim] arrays: float64 [n].

    NaN if a row is not finite, 0 if it is zero. Computed in float64: float32's own rounding, 6e-8,
    is most of what fp32 may differ by.
    """
    return (unit(a) * unit(b)).sum(axis=1)


def measure_ranges(
    vectors: np.ndarray, *, unit_length: bool = True
) -> dict[str, list[list[float]]]:
    """Measure each value's minimum and maximum, at the full width and at each MRL dimension.

    Args:
        vectors: float32 [n, m].
        unit_length: As for `shorten`.

    Returns:
        Width, as a string, to [minima, maxima], two lists of that width.
    """
    ranges = {}
    for dim in mrl_dims(vectors.shape[1]):
        cut = shorten(vectors, dim, unit_length=unit_length)
        bounds = (cut.min(axis=0), cut.max(axis=0))
        ranges[str(dim)] = [[float(f"{x:.{DIGITS}g}") for x in bound] for bound in bounds]
    return ranges


def mrl_dims(width: int) -> tuple[int, ...]:
    """The full width, and the MRL dimensions below it."""
    return (width, *(dim for dim in MRL_DIMS if dim < width))


def check_ranges(
    precision: str, dim: int, ranges: Mapping[str, Sequence[Sequence[float]]] | None
) -> None:
    """Check that vectors of width `dim` can be quantized.

    Raises:
        InputError: The precision needs ranges, and there are none for this width.
    """
    if precision not in IN_8_BITS or str(dim) in (ranges or {}):
        return
    if ranges:
        raise InputError(
            f"{precision} needs each value's range at {dim} dimensions, and ranges are measured at "
            f"{', '.join(ranges)}: choose one of these"
        )
    raise InputError(
        f"{precision} needs each value's range at {dim} dimensions, and there are none: call "
        "`embedder.calibrate(texts)` with texts like your own, or `embedport encode ARTIFACT "
        "--calibrate texts.jsonl`, once"
    )


def quantize_vectors(
    vectors: np.ndarray,
    precision: str,
    ranges: Mapping[str, Sequence[Sequence[float]]] | None,
) -> np.ndarray:
    """Quantize vectors as sentence-transformers' `quantize_embeddings` does.

    Args:
        vectors: float32 [n, dim].
        precision: One of `VECTOR_PRECISIONS`.
        ranges: From `measure_ranges`, for "int8" and "uint8".

    Returns:
        "float32": the vectors. "uint8": [n, dim], 255 steps from a value's minimum to its maximum;
        "int8": the same less 128. "binary" (int8) and "ubinary" (uint8): [n, ceil(dim / 8)], one
        bit per value, 1 if it is positive; the first value is the highest bit.

    Raises:
        InputError: The precision needs ranges, and there are none for this width.
    """
    if precision == "float32":
        return vectors
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=1)
        return bits if precision == "ubinary" else (bits ^ 0x80).view(np.int8)
    check_ranges(precision, vectors.shape[1], ranges)
    assert ranges is not None
    low, high = (np.asarray(bound, np.float32) for bound in ranges[str(vectors.shape[1])])
    steps = (high - low) / 255
    steps[steps == 0] = 1
    # Clip: values of texts not seen in calibration may exceed the ranges.
    codes = np.clip(np.floor((vectors - low) / steps), 0, 255).astype(np.uint8)
    return codes if precision == "uint8" else (codes ^ 0x80).view(np.int8)
