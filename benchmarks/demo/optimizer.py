"""AdamW with its schedule, for every training."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import Qwen3Model

SHOWN = 25


class Optimizer:
    """AdamW, a linear warm-up and a cosine down to nothing; prints the mean losses now and then.

    Args:
        model: Of its parameters those that require gradients are trained.
        learning_rate: Behind the warm-up.
        steps: Of the whole training; a tenth of them is the warm-up.
        name: Of the training, for what is printed.
    """

    def __init__(self, model: Qwen3Model, learning_rate: float, steps: int, name: str) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._adam = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: _rate(step, steps, warm_up=steps // 10)
        )
        self._steps = steps
        self._name = name
        self._shown: list[list[float]] = []
        self._began = time.perf_counter()

    def step(self, *losses: torch.Tensor) -> None:
        """One step down the sum of the losses."""
        self._adam.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()
        self._shown.append([loss.item() for loss in losses])
        done = len(self._shown)
        if done % SHOWN == 0:
            means = ", ".join(f"{mean:.3f}" for mean in np.mean(self._shown[-SHOWN:], axis=0))
            spent = time.perf_counter() - self._began
            print(f"{self._name} {done}/{self._steps}: losses {means}, {spent:.0f} s", flush=True)


def _rate(step: int, steps: int, warm_up: int) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up))))
