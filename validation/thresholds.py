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
        max_ndcg_loss: The reference's nDCG@10 less the artifact's on a retrieval set.
    """

    min_cosine: float
    max_score_difference: float
    min_invariance: float
    max_invariance_difference: float
    max_length_error: float
    max_ndcg_loss: float

    @property
    def tie_margin(self) -> float:
        """Documents whose reference scores differ by no more than this have no order.

        What a score may be off by; so the gate on order is about pairs that the gate on scores
        would let change places: two scores may be off towards each other.
        """
        return self.max_score_difference


# Quantized precisions are held to what serves, not to what fp32 can do: docs/quantization.md has
# what was measured.
THRESHOLDS = {
    "fp32": Thresholds(0.99999, 1e-4, 0.999999, 1e-5, 1e-5, 0.001),
    "fp16": Thresholds(0.9995, 0.01, 0.9999, 1e-3, 1e-3, 0.002),
    "bf16": Thresholds(0.9995, 0.01, 0.9995, 1e-2, 1e-3, 0.005),
    "int8": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    "int8-weight": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    "int4": Thresholds(0.9, 0.2, 0.999999, 1e-5, 1e-5, 0.02),
    "mixed": Thresholds(0.99, 0.05, 0.999999, 1e-5, 1e-5, 0.005),
    # Checkpoints: 16-bit arithmetic between the matrices, in which a batch's other rows move the
    # last bit; rounding activations to 8 bits makes a whole step of some of these bits.
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


# A quantized graph that computes in 16 bits: the last bit moves with a batch's other rows, and
# moves activations by a whole step of their 8 bits.
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
    """The thresholds of a precision, or others in their place.

    Args:
        precision: As a manifest has it.
        arithmetic: Of a graph: what it computes in, where it is not quantized.
        min_cosine: Instead of the precision's.
        max_score_difference: Instead of the precision's.
        max_ndcg_loss: Instead of the precision's.

    Raises:
        InputError: The precision is unknown; lists the known ones.
    """
    if precision not in THRESHOLDS:
        raise InputError(
            f"there are no thresholds for precision {precision!r}, only for {', '.join(THRESHOLDS)}"
        )
    thresholds = THRESHOLDS[precision]
    if arithmetic != "fp32" and precision not in ("fp16", "bf16"):
        thresholds = replace(thresholds, **IN_16_BITS)
    if min_cosine is not None:
        thresholds = replace(thresholds, min_cosine=min_cosine)
    if max_score_difference is not None:
        thresholds = replace(thresholds, max_score_difference=max_score_difference)
    if max_ndcg_loss is not None:
        thresholds = replace(thresholds, max_ndcg_loss=max_ndcg_loss)
    return thresholds
