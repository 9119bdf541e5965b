"""Learning rate, parameter groups, and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, schedule: str, decay: float) -> float:
    """The learning rate of a step: it rises linearly to `peak`, where "constant" keeps it.

    "cosine" falls along a cosine after the warm-up; "wsd" (warm-up, stable, decay) stays at the peak and falls linearly
    over the last `decay * steps` steps. Both end at a tenth of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (0.55 + 0.45 * math.cos(math.pi * progress))
    if schedule == "constant":
        return peak
    falling = max(0.0, (step - (1 - decay) * steps) / (decay * steps))
    return peak * (1 - 0.9 * falling)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimiser: weight decay for matrices and convolutions, none for vectors and embeddings."""
    decaying = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    # torch's state dicts lose the settings of a group that has no parameters.
    return [group for group in groups if group["params"]]


class MovingAverage:
    """average = decay * average + (1 - decay) * weights after every step, sharded as the weights are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        self.averages: dict[str, Tensor] = {name: p.clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - self.decay)
