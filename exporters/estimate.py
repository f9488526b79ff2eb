"""Dry runs: the steps, size, memory and time of an export or a quantization."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..artifact.card import format_words
from ..checkpoint.spec import ModelSpec, Task
from ..quantize.fold import CONSUMERS
from ..quantize.formats import TABLE, matrices
from ..quantize.recipe import STORED, Recipe
from ..tables import INPUT, count_words

# Nanoseconds for each weight that is searched for its group's range, rounded column by column, or
# rounded to nearest and written. Fitted to two layers of the 0.6B geometry (GPTQ 6.0 s a layer,
# GPTAQ 11.7 s, two cores of an Intel Xeon with AVX-512, 2026-11-29).
SEARCHED, ROUNDED, WRITTEN = 80, 80, 20
# Seconds to open and close a session of one layer.
SESSION = 0.1
# Seconds to start, and to import torch and a library that writes a format.
STARTING, IMPORTING = 1.0, 7.0
# Bytes of the interpreter with numpy, onnx and onnxruntime; of torch with its libraries.
BASE_BYTES, TORCH_BYTES = 300 << 20, 700 << 20
# The side of the product that measures how fast this machine multiplies.
SIDE = 1024


@dataclass(frozen=True)
class Estimate:
    """A run that was planned and not done.

    Attributes:
        steps: What would be done, a line each.
        bytes: The size of the weights that would be written; None if a search would decide it.
        memory_bytes: The largest resident memory, about.
        seconds: The time, about, if nothing else runs on the machine.
    """

    steps: tuple[str, ...]
    bytes: int | None
    memory_bytes: int
    seconds: float


def describe_recipe(recipe: Recipe, rows: Sequence[np.ndarray], task: Task) -> list[str]:
    """A recipe's steps in words."""
    steps = []
    if recipe.rotate:
        steps.append("rotate the residual stream and the attention heads")
    if recipe.rotate_heads:
        steps.append("rotate the attention heads")
    if recipe.balance:
        steps.append("balance outlier channels between norms and matrices")
    if recipe.is_calibrated:
        tokens = sum(map(len, rows))
        inputs = count_words(len(rows), f"calibration {INPUT[task]}")
        steps.append(f"run {inputs} of {tokens:,} tokens, layer by layer")
    formats = dict(recipe.formats)
    # No text's activations reach the table: it has its own rounding whatever the algorithm is.
    if table := formats.pop(TABLE, None):
        steps.append(f"quantize the embedding table to {format_words(table)}")
    for text, count in Counter(formats.values()).items():
        what = f"{count} matrices" if count > 1 else "one matrix"
        if recipe.algorithm == STORED:
            steps.append(f"take the checkpoint's own codes of {what}, {format_words(text)}")
        else:
            steps.append(f"quantize {what} to {format_words(text)} by {recipe.algorithm}")
    return steps


def estimate_memory(
    spec: ModelSpec, recipe: Recipe | None, rows: Sequence[np.ndarray], *, torch: bool = False
) -> int:
    """The largest resident memory in bytes, about."""
    layer = max(_layer_weights(spec).values())
    total = BASE_BYTES + torch * TORCH_BYTES + 3 * 4 * layer
    if recipe is not None and recipe.is_calibrated:
        stages = _stage_inputs(spec)
        # Two inputs at once, one being made from the other; in GPTAQ the original model's too.
        states = (spec.hidden_size + 2 * max(stages)) * (1 + (recipe.compensation == "gptaq"))
        total += 4 * sum(map(len, rows)) * states + 3 * 8 * max(stages) ** 2
    return total


def estimate_seconds(
    spec: ModelSpec,
    recipe: Recipe | None,
    rows: Sequence[np.ndarray],
    bytes_written: int,
    *,
    torch: bool = False,
) -> float:
    """Seconds, about, on this machine, whose products are measured."""
    weights = _layer_weights(spec)
    total = sum(weights.values()) * spec.num_layers
    seconds = (
        STARTING
        + torch * IMPORTING
        + bytes_written / 1e9
        + WRITTEN * 1e-9 * total
        + SESSION * spec.num_layers
    )
    if recipe is None or not recipe.is_calibrated:
        return seconds
    stages, tokens = _stage_inputs(spec), sum(map(len, rows))
    squares = sum(size**2 for size in stages)
    corrections = sum(count * columns for (_, columns), count in weights.items())
    products = tokens * sum(weights.values())
    sessions = 5
    if recipe.compensation is not None:
        # The Hessian is symmetric; its root and inverse are in float64.
        products += tokens * squares / 2 + sum(2 * size**3 for size in stages) + corrections / 2
    if recipe.compensation == "gptaq":
        products += tokens * (sum(weights.values()) + squares) + 3 * corrections
        sessions *= 2
    seconds += spec.num_layers * (2 * products / _products_per_second() + sessions * SESSION)
    return seconds * recipe.passes + (SEARCHED + ROUNDED) * 1e-9 * total


def _layer_weights(spec: ModelSpec) -> Mapping[tuple[str, int], int]:
    """The weights of each projection of a layer, by its name and number of inputs."""
    weights = {}
    for name in matrices(spec):
        if name.startswith("layers.0."):
            shape = spec.tensor_shapes()[f"{name}.weight"]
            weights[name, shape[1]] = math.prod(shape)
    return weights


def _stage_inputs(spec: ModelSpec) -> list[int]:
    """The number of inputs of each tensor that projections read."""
    return [
        spec.tensor_shapes()[f"layers.0.{consumers[0]}.weight"][1]
        for consumers in CONSUMERS.values()
    ]


def _products_per_second() -> float:
    a = np.ones((SIDE, SIDE), np.float32)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)
