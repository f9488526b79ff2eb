"""AdamW with a learning-rate schedule, for all training stages."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Model

SHOWN = 25
SAVED = 50


class Optimizer:
    """AdamW with linear warm-up and cosine decay to zero; regularly prints the mean losses.

    Args:
        model: The model; its parameters that require gradients are trained.
        learning_rate: The peak learning rate, after the warm-up.
        steps: Total number of steps; the first tenth is the warm-up.
        name: The stage's name in the printed lines.
        state: File that keeps the weights and the optimizer's state every 50 steps. If it exists,
            the model continues from there.

    Attributes:
        done: Number of steps taken.
    """

    def __init__(
        self,
        model: Qwen3Model,
        learning_rate: float,
        steps: int,
        name: str,
        state: Path | None = None,
    ) -> None:
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self._adam = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: _rate(step, steps, warm_up=steps // 10)
        )
        self._steps = steps
        self._name = name
        self._model = model
        self._state = state
        self._shown: list[list[float]] = []
        self.done = 0
        if state is not None and state.exists():
            saved = torch.load(state, weights_only=True)
            model.load_state_dict(saved["model"])
            self._adam.load_state_dict(saved["adam"])
            self._schedule.load_state_dict(saved["schedule"])
            self.done = saved["done"]
        self._began = time.perf_counter()

    def step(self, *losses: torch.Tensor) -> None:
        """Take one step on the sum of the losses."""
        self._adam.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()
        self._shown.append([loss.item() for loss in losses])
        self.done += 1
        if self.done % SHOWN == 0:
            means = ", ".join(f"{mean:.3f}" for mean in np.mean(self._shown[-SHOWN:], axis=0))
            seconds = time.perf_counter() - self._began
            print(
                f"{self._name} {self.done}/{self._steps}: losses {means}, {seconds:.0f} s",
                flush=True,
            )
        if self._state is not None and self.done % SAVED == 0:
            self._save(self._state)

    def _save(self, path: Path) -> None:
        written = path.with_suffix(".new")
        states = {
            "model": self._model.state_dict(),
            "adam": self._adam.state_dict(),
            "schedule": self._schedule.state_dict(),
            "done": self.done,
        }
        torch.save(states, written)
        written.replace(path)


def _rate(step: int, steps: int, warm_up: int) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up))))
