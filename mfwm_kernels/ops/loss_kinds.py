"""The kinds of multi_horizon_loss: their names and formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("mse", "l1", "huber", "charbonnier", "gaussian", "laplace")
# Kinds whose predictions have a log-scale beside each mean, and the kind that compares their means in a pair.
KIND_OF_MEANS = {"gaussian": "mse", "laplace": "l1"}
DISTRIBUTIONS = [KINDS.index(kind) for kind in KIND_OF_MEANS]  # the last kinds
# Log-scales are clamped to +-LOG_SCALE_LIMIT.
LOG_SCALE_LIMIT = 10.0


def pointwise_loss(
    kind: str, difference: Tensor, log_scale: Tensor | None, *, beta: float, delta: float, eps: float
) -> Tensor:
    """The loss of each difference; `log_scale` is that of a distribution, else None."""
    if log_scale is not None:
        s = log_scale.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        if kind == "laplace":
            return s + difference.abs() * torch.exp(-s)
        return 0.5 * (s + difference.square() * torch.exp(-s)) * torch.exp(beta * s.detach())
    if kind == "mse":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    if kind == "huber":
        return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=delta)
    return (difference.square() + eps**2).sqrt()
