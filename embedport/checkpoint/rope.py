"""Rotary position embedding (RoPE): its settings and frequencies, as in transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError
from .keys import shown

Kind = Literal["default", "linear", "yarn"]
NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


@dataclass(frozen=True)
class Rope:
    """Settings of the rotary embedding.

    Attributes:
        kind: "default"; "linear", which divides positions by the factor; "yarn" (arXiv:2309.00071).
        theta: The base.
        factor: Context extension: maximum length divided by `original`.
        original: Number of positions that the model was trained for before scaling.
        beta_fast: Frequencies with more rotations over `original` positions stay unchanged.
        beta_slow: Frequencies with fewer rotations are divided by the factor.
        truncate: Whether the bounds of the ramp between the two are rounded to whole numbers.
        attention_factor: Multiplies cosines and sines.
    """

    kind: Kind
    theta: float
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """The angle per position of each pair of values: float32 [head_dim / 2].

        theta^(-2i / head_dim) (RoFormer, arXiv:2104.09864, eq. 15). YaRN divides low frequencies by
        the factor, keeps high ones, and interpolates linearly in between (arXiv:2309.00071, section
        3.2).
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # numpy's float32 power differs by a bit between CPUs, and artifacts with it.
        powers = (np.float64(self.theta) ** exponents).astype(np.float32)
        unscaled = np.float32(1) / powers
        if self.kind == "default":
            return unscaled
        if self.kind == "linear":
            return unscaled / np.float32(self.factor)
        scaled = np.float32(1) / (np.float32(self.factor) * powers)
        low, high = (self._bound(beta, head_dim) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        pairs = np.arange(head_dim // 2, dtype=np.float32)
        ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
        return scaled * ramp + unscaled * (1 - ramp)

    def _bound(self, rotations: float, head_dim: int) -> float:
        """The (fractional) index of the pair that makes these rotations in `original` positions."""
        turns = math.log(self.original / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(self.theta))

    def to_parameters(self) -> dict[str, Any]:
        """The settings as transformers 5's rope_parameters."""
        values: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            values["factor"] = self.factor
        if self.kind == "yarn":
            values |= {
                "original_max_position_embeddings": self.original,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "truncate": self.truncate,
                "attention_factor": self.attention_factor,
            }
        return values


def read_rope(values: Mapping[str, Any], path: Path, positions: int) -> Rope:
    """Read the rotary embedding of a config.json.

    transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling. If both are
    there, transformers 5 uses rope_scaling; a rope_theta inside either overrides the top-level one.

    Args:
        values: The configuration.
        path: Its file, for errors.
        positions: Its max_position_embeddings.

    Raises:
        CheckpointError: Its type is not supported, or a value is missing or invalid.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    parameters = values.get(key) or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path}: {key} should be an object, found {shown(parameters)}")
    where = f"{path}: {key}"
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "yarn"):
        raise CheckpointError(
            f"{path}: rotary embedding of type {kind!r} is not supported, only 'default', 'linear' "
            "and 'yarn'"
        )
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate")
    for name, value in parameters.items():
        if name not in (*known, *NUMBERS, "original_max_position_embeddings"):
            raise CheckpointError(f"{where}: {name} is not known here, found {shown(value)}")
    for settings in (values, parameters):
        if settings.get("partial_rotary_factor") not in (None, 1):
            raise CheckpointError(f"{path}: partial_rotary_factor is not supported, only 1")
    theta = parameters.get("rope_theta")
    theta = values.get("rope_theta") if theta is None else theta
    if theta is None:
        raise CheckpointError(f"{path}: rope_theta is missing")
    theta = _number(theta, f"{path}: rope_theta")
    if kind == "default":
        return Rope("default", theta)
    numbers = {
        name: _number(parameters[name], f"{where}: {name}")
        for name in NUMBERS
        if parameters.get(name) is not None
    }
    factor = numbers.get("factor")
    original = parameters.get("original_max_position_embeddings") or positions
    if not isinstance(original, int) or original < 1:
        raise CheckpointError(
            f"{where}: original_max_position_embeddings should be a positive whole number, found "
            f"{shown(original)}"
        )
    if factor is None:
        raise CheckpointError(f"{where}: factor is missing")
    if kind == "linear":
        return Rope("linear", theta, factor)
    if theta <= 1:
        raise CheckpointError(f"{path}: rope_theta should be above 1 with yarn, found {theta:g}")
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"{where}: truncate should be true or false, found {truncate!r}")
    return Rope(
        "yarn",
        theta,
        factor,
        original,
        numbers.get("beta_fast", 32.0),
        numbers.get("beta_slow", 1.0),
        truncate,
        _attention_factor(numbers, factor),
    )


def _attention_factor(numbers: Mapping[str, float], factor: float) -> float:
    """YaRN's attention factor (arXiv:2309.00071, eq. 22), unless the file gives it."""

    def grown(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    if "attention_factor" in numbers:
        return numbers["attention_factor"]
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        return grown(numbers["mscale"]) / grown(numbers["mscale_all_dim"])
    return grown(1.0)


def _number(value: Any, where: str) -> float:
    # Beyond these bounds a product overflows.
    if type(value) not in (int, float) or not 1e-300 < value < 1e300:
        raise CheckpointError(f"{where} should be a positive number, found {shown(value)}")
    return float(value)
