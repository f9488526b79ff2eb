"""The limits that an artifact must meet, by precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """The limits of the gates.

    Attributes:
        min_cosine: Cosine of a vector and the reference's, at full width and at the MRL gate's.
        max_score_difference: Difference from the reference's query-document similarity or reranker
            probability.
        min_invariance: Cosine of a text's vector in a batch and its vector alone.
        max_invariance_difference: Difference of a pair's score in a batch and its score alone.
        max_length_error: Difference of a vector's length from 1.
        max_ndcg_loss: The reference's nDCG@10 minus the artifact's on a retrieval set.
    """

    min_cosine: float
    max_score_difference: float
    min_invariance: float
    max_invariance_difference: float
    max_length_error: float
    max_ndcg_loss: float

    @property
    def tie_margin(self) -> float:
        """Documents count as tied if their reference scores differ by no more than this.

        It equals the allowed error of one score. Two scores may err towards each other, so the
        order gate still catches swaps that the score gate allows.
        """
        return self.max_score_difference


# Limits of quantized precisions are set by what is good enough to serve, not by what fp32 reaches.
# Measurements: docs/quantization.md.
THRESHOLDS = {
    "fp32": Thresholds(0.99999, 1e-4, 0.999999, 1e-5, 1e-5, 0.001),
    "fp16": Thresholds(0.9995, 0.01, 0.9999, 1e-3, 1e-3, 0.002),
    "bf16": Thresholds(0.9995, 0.01, 0.9995, 1e-2, 1e-3, 0.005),
    "int8": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    "int8-weight": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    "int4": Thresholds(0.9, 0.2, 0.999999, 1e-5, 1e-5, 0.02),
    "mixed": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    # Checkpoints compute in 16 bits between the matrix products, so a batch's other rows can change
    # the last bit. If activations are rounded to 8 bits, that can become a whole quantization step.
    "bnb-int8": Thresholds(0.99, 0.05, 0.999, 1e-2, 1e-3, 0.005),
    "w8a8": Thresholds(0.98, 0.05, 0.999, 1e-2, 1e-3, 0.005),
    "fp8": Thresholds(0.98, 0.05, 0.995, 2e-2, 1e-3, 0.01),
    "w8a16": Thresholds(0.99, 0.05, 0.9995, 1e-2, 1e-3, 0.005),
    "bnb-nf4": Thresholds(0.9, 0.2, 0.9995, 1e-2, 1e-3, 0.02),
    "gptq": Thresholds(0.9, 0.2, 0.9995, 1e-2, 1e-3, 0.02),
    "gptq-8": Thresholds(0.99, 0.05, 0.9995, 1e-2, 1e-3, 0.005),
    "awq": Thresholds(0.9, 0.2, 0.9995, 1e-2, 1e-3, 0.02),
    "w4a16": Thresholds(0.9, 0.2, 0.9995, 1e-2, 1e-3, 0.02),
    "nvfp4": Thresholds(0.9, 0.2, 0.9995, 1e-2, 1e-3, 0.02),
}


# Limits for quantized graphs that compute in 16 bits: a batch's other rows can change the last bit,
# and that can move an 8-bit activation by a whole quantization step.
IN_16_BITS = {
    "min_invariance": 0.995,
    "max_invariance_difference": 2e-2,
    "max_length_error": 1e-3,
}


def find_thresholds(
    precision: str,
    *,
    arithmetic: str = "fp32",
    min_cosine: float | None = None,
    max_score_difference: float | None = None,
    max_ndcg_loss: float | None = None,
) -> Thresholds:
    """The thresholds of a precision, with overrides.

    Args:
        precision: The precision as in a manifest.
        arithmetic: The dtype in which a graph computes everything that is not quantized.
        min_cosine: Replaces the precision's.
        max_score_difference: Replaces the precision's.
        max_ndcg_loss: Replaces the precision's.

    Raises:
        InputError: The precision is unknown.
    """
    if precision not in THRESHOLDS:
        raise InputError(
            f"there are no thresholds for precision {precision!r}, only for {', '.join(THRESHOLDS)}"
        )
    thresholds = THRESHOLDS[precision]
    if arithmetic != "fp32" and precision not in ("fp16", "bf16"):
        thresholds = replace(thresholds, **IN_16_BITS)
    overrides = {
        "min_cosine": min_cosine,
        "max_score_difference": max_score_difference,
        "max_ndcg_loss": max_ndcg_loss,
    }
    given = {name: limit for name, limit in overrides.items() if limit is not None}
    return replace(thresholds, **given)
