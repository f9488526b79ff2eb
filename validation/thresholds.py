"""How far an artifact may be from the reference, by precision."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """The gates of a validation.

    Attributes:
        min_cosine: The least cosine of any text to the reference; embeddings.
        max_score_difference: The largest difference of any score; rerankers.
        min_invariance: The least cosine of a text to itself in another batch; embeddings.
        max_invariance_difference: The same for scores; rerankers.
    """

    min_cosine: float
    max_score_difference: float
    min_invariance: float
    max_invariance_difference: float


THRESHOLDS = {
    "fp32": Thresholds(0.99999, 1e-4, 0.999999, 1e-5),
    "fp16": Thresholds(0.9995, 0.01, 0.9999, 1e-3),
    "bf16": Thresholds(0.9995, 0.02, 0.9995, 1e-2),
}


def find_thresholds(precision: str) -> Thresholds:
    """A precision's thresholds.

    Raises:
        InputError: There are none for it.
    """
    if precision not in THRESHOLDS:
        raise InputError(
            f"no thresholds for precision {precision!r}; there are {', '.join(THRESHOLDS)}"
        )
    return THRESHOLDS[precision]
