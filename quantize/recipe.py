"""A recipe: everything that determines how a model is quantized, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.spec import Task
from ..errors import InputError
from ..strict_json import load_json

ROUNDINGS = ("gptq", "gptaq")
SCALINGS = ("awq", "smoothquant")
ALGORITHMS = (
    "rtn",
    "mse",
    *ROUNDINGS,
    *SCALINGS,
    *(f"{scaling}+{rounding}" for scaling in SCALINGS for rounding in ROUNDINGS),
)
# The default of 4 bits by task: see `fit_to_task`.
BY_TASK = {"embedding": "gptaq", "reranker": "awq+gptq"}
# The default of `auto`. Where many matrices have 8 bits, GPTAQ's following of the original model
# costs more than it gains (measured in docs/quantization.md).
AUTO_ALGORITHM = "awq+gptq"
# Names that older artifacts have in their recipes. Their "hqq" was a search for ranges.
RENAMED = {"hqq": "mse"}
# No fp16: products may overflow it before their per-token scales are applied.
ARITHMETIC = ("fp32", "bf16")
# The codes of an already quantized checkpoint.
STORED = "stored"
# Keys of an artifact's record that are no part of the recipe.
RECORDED = ("search",)


def fit_to_task(algorithm: str, task: Task) -> str:
    """A calibrated algorithm with GPTQ in GPTAQ's place for a reranker.

    Following the original model (GPTAQ) helps vectors; it fits the few templates of a reranker too
    closely (measured in docs/quantization.md).

    Args:
        algorithm: One of `ALGORITHMS`.
        task: The model's task.
    """
    return algorithm if task == "embedding" else algorithm.replace("gptaq", "gptq")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        formats: Matrix ("layers.3.mlp.down_proj", "embed_tokens") to the text of its format; a
            matrix without an entry is not quantized, and is in `arithmetic`.
        algorithm: One of `ALGORITHMS`: "rtn", "mse", "gptq", "gptaq", "awq", "smoothquant", or
            "awq+gptaq" and its like, one's scaling and then another's rounding; or "stored", the
            codes of an already quantized checkpoint. The embedding table cannot be calibrated and
            no checkpoint stores codes of it: all algorithms but "rtn" quantize it with "mse".
        rotate: Whether the residual stream and the attention's values are rotated.
        rotate_heads: Whether the attention's values alone are rotated.
        balance: Whether outlier channels are moved from activations into weights, judged by the
            weights alone (see `quantize.smoothquant`); for "int8", which quantizes activations.
        seed: The rotation's random seed.
        arithmetic: The graph's compute dtype, "fp32" (for CPUs) or "bf16" (for GPUs).
        calibration: A record of the texts that the recipe was made with (see
            `describe_calibration`); other texts are refused.
    """

    formats: Mapping[str, str]
    algorithm: str = "rtn"
    rotate: bool = False
    rotate_heads: bool = False
    balance: bool = False
    seed: int = 0
    arithmetic: str = "fp32"
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in (*ALGORITHMS, STORED):
            raise InputError(
                f"algorithm should be one of {', '.join(ALGORITHMS)}, found {self.algorithm!r}"
            )
        if self.arithmetic not in ARITHMETIC:
            raise InputError(f"arithmetic should be fp32 or bf16, found {self.arithmetic!r}")
        if self.seed < 0:
            raise InputError(f"seed should be 0 or more, found {self.seed}")
        if self.rotate and self.rotate_heads:
            raise InputError("rotate turns heads too: rotate_heads should be false, found true")
        if self.algorithm == STORED and (self.rotate or self.rotate_heads or self.balance):
            raise InputError(
                f"algorithm {STORED!r} takes a checkpoint's codes as they are: rotate, "
                "rotate_heads and balance should be false, found "
                f"{self.rotate}, {self.rotate_heads} and {self.balance}"
            )

    @property
    def scaling(self) -> str | None:
        """Which algorithm scales channels, "awq" or "smoothquant"; None for none."""
        first = self.algorithm.split("+")[0]
        return first if first in SCALINGS else None

    @property
    def compensation(self) -> str | None:
        """Which algorithm compensates for errors, "gptq" or "gptaq"; None for none."""
        last = self.algorithm.split("+")[-1]
        return last if last in ROUNDINGS else None

    @property
    def passes(self) -> int:
        """How often calibration texts run through the layers."""
        return (self.scaling is not None) + (self.compensation is not None)

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration texts are run."""
        return self.passes > 0

    def to_record(self) -> dict[str, Any]:
        """The recipe as a manifest or recipe.json holds it."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a recipe from recipe.json, or from the embedport.json of an artifact.

        Raises:
            InputError: It is missing, damaged, or holds no recipe.
        """
        try:
            values = load_json(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a recipe: {error}") from error
        if isinstance(values, dict) and "format_version" in values:
            values = values.get("recipe")
        if not isinstance(values, dict) or not isinstance(values.get("formats"), dict):
            raise InputError(
                f'{path} should hold {{"formats": {{"layers.0.mlp.down_proj": "int8", …}}, …}}, '
                "or be the embedport.json of a quantized artifact"
            )
        values = {key: value for key, value in values.items() if key not in RECORDED}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - {*known}):
            raise InputError(
                f"{path}: {unknown[0]!r} is not part of a recipe; its parts: {', '.join(known)}"
            )
        kinds = {"rotate": bool, "rotate_heads": bool, "balance": bool, "seed": int}
        for key, kind in kinds.items():
            if key in values and type(values[key]) is not kind:
                raise InputError(f"{path}: {key} should be {kind.__name__}, found {values[key]!r}")
        calibration = values.get("calibration")
        if calibration is not None and not (
            isinstance(calibration, dict) and {"source", "sha256"} <= calibration.keys()
        ):
            raise InputError(
                f"{path}: calibration should be null or an artifact's record with source and "
                f"sha256, found {calibration!r}"
            )
        algorithm = values.get("algorithm")
        if isinstance(algorithm, str):
            values["algorithm"] = RENAMED.get(algorithm, algorithm)
        return cls(**values)
