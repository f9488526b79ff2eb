"""Dry runs: the steps, size, memory and time of an export or a quantization."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
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


def estimate_cost(
    spec: ModelSpec,
    recipe: Recipe | None,
    rows: Sequence[np.ndarray],
    bytes_written: int,
    *,
    torch: bool = False,
) -> tuple[int, float]:
    """The largest resident memory in bytes, and seconds on this machine, both about.

    How fast the machine multiplies is measured.
    """
    shapes = spec.tensor_shapes()
    layer = [shapes[f"{name}.weight"] for name in matrices(spec) if name.startswith("layers.0.")]
    weights = sum(map(math.prod, layer))
    memory = BASE_BYTES + torch * TORCH_BYTES + 3 * 4 * max(map(math.prod, layer))
    seconds = (
        STARTING
        + torch * IMPORTING
        + bytes_written / 1e9
        + WRITTEN * 1e-9 * weights * spec.num_layers
        + SESSION * spec.num_layers
    )
    if recipe is None or not recipe.is_calibrated:
        return memory, seconds
    stages, tokens = _stage_inputs(spec), sum(map(len, rows))
    # Two inputs at once, one being made from the other; in GPTAQ the original model's too.
    states = (spec.hidden_size + 2 * max(stages)) * (1 + (recipe.compensation == "gptaq"))
    memory += 4 * tokens * states + 3 * 8 * max(stages) ** 2
    squares = sum(size**2 for size in stages)
    corrections = sum(outputs * inputs**2 for outputs, inputs in layer)
    products, sessions = tokens * weights, 5
    if recipe.compensation is not None:
        # The Hessian is symmetric; its root and inverse are in float64.
        products += tokens * squares / 2 + sum(2 * size**3 for size in stages) + corrections / 2
    if recipe.compensation == "gptaq":
        products += tokens * (weights + squares) + 3 * corrections
        sessions *= 2
    seconds += spec.num_layers * (2 * products / _products_per_second() + sessions * SESSION)
    rounded = (SEARCHED + ROUNDED) * 1e-9 * weights * spec.num_layers
    return memory, seconds * recipe.passes + rounded


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
