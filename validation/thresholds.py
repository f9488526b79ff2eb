"""What an artifact of each precision must reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """The limits of the gates.

    Attributes:
        min_cosine: Of a vector to the reference's, at full width and at the MRL gate's.
        max_score_difference: Of a query-document similarity or a reranker's probability to the
            reference's.
        min_invariance: Cosine of a text's vector in a batch to its vector alone.
        max_invariance_difference: Of a pair's score in a batch to its score alone.
        max_length_error: Of a vector's length to 1.
    """

    min_cosine: float
    max_score_difference: float
    min_invariance: float
    max_invariance_difference: float
    max_length_error: float


THRESHOLDS = {
    "fp32": Thresholds(0.99999, 1e-4, 0.999999, 1e-5, 1e-5),
    "fp16": Thresholds(0.9995, 0.01, 0.9999, 1e-3, 1e-3),
    "bf16": Thresholds(0.9995, 0.01, 0.9995, 1e-2, 1e-3),
}


def find_thresholds(
    precision: str, *, min_cosine: float | None = None, max_score_difference: float | None = None
) -> Thresholds:
    """The thresholds of a precision, or others in their place.

    Raises:
        InputError: The precision is unknown; lists the known ones.
    """
    if precision not in THRESHOLDS:
        raise InputError(
            f"there are no thresholds for precision {precision!r}, only for {', '.join(THRESHOLDS)}"
        )
    thresholds = THRESHOLDS[precision]
    if min_cosine is not None:
        thresholds = replace(thresholds, min_cosine=min_cosine)
    if max_score_difference is not None:
        thresholds = replace(thresholds, max_score_difference=max_score_difference)
    return thresholds
