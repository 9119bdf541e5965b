"""How much each horizon counts, where that is not fixed, and what to do where horizons fight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfwm_kernels import GradMonitor

# Of the running mean of gradient norms: half of it is of the last seven steps.
DECAY = 0.9


class Uncertainty(nn.Module):
    """Weights w_i exp(-s_i), s_i learned: total = sum_i w_i (exp(-s_i) loss_i + s_i) (Kendall et al., 1705.07115).

    s_i is the log variance of horizon i's error; the total is least where it is the log of the loss, so that every
    horizon weighs by how well it can be predicted.
    """

    fixed: Tensor

    def __init__(self, weights: Sequence[float]):
        super().__init__()
        self.register_buffer("fixed", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(len(weights), dtype=torch.float32))

    def weights(self) -> Tensor:
        return self.fixed * torch.exp(-self.log_variance)

    def cost(self, shares: Tensor) -> Tensor:
        """sum_i share_i w_i s_i: 1 for the horizons that counted anywhere (the others have no error to speak of), or
        a part's share in a larger batch."""
        return (self.fixed * self.log_variance * shares).sum()


class GradientNorms(nn.Module):
    """Scales that give each horizon its share of the gradient into the shared hidden state.

    scale_i * norm_i is proportional to shares_i, and the scaled norms add up to the unscaled ones, by a running mean of
    the norms that GradMonitor collects. What is learned from the last backward counts from the next forward on.
    """

    shares: Tensor
    last: Tensor
    mean: Tensor

    def __init__(self, shares: Sequence[float]):
        super().__init__()
        self.register_buffer("shares", torch.tensor(shares), persistent=False)
        # Both in checkpoints, so that a resumed run goes on with the norms of the step before it.
        self.register_buffer("last", torch.zeros(len(shares)))
        self.register_buffer("mean", torch.zeros(len(shares)))

    def watch(self, monitor: GradMonitor) -> None:
        """Set the monitor's scale, and have it write its norms here."""
        first = (self.mean == 0) & (self.last > 0)
        mixed = torch.lerp(self.last, self.mean, DECAY)
        self.mean.copy_(torch.where(self.last > 0, mixed.where(~first, self.last), self.mean))
        self.last.zero_()
        known = self.mean > 0
        shares = self.shares * known
        scale = shares * self.mean.sum() / shares.sum() / self.mean
        monitor.scale = torch.where(known, scale, 1.0)
        monitor.norms = self.last


def shared_out(weights: Tensor | Sequence[Any] | None, shares: Tensor) -> Tensor:
    """Weights [K] (None: ones) or [K, K], times shares of the same shape."""
    return shares if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=shares.device) * shares


def surgery_scale(gram: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad (Yu et al., arXiv 2001.06782) of gradients g_i from their dot products alone.

    Each g_i loses, for the others j in the order orders[i], its part along g_j where they point apart:
    g_i' -= min(0, <g_i', g_j>) / |g_j|^2 g_j. Every g_i' is a mix of the g_j, hence so is their sum.

    Args:
        gram: [K, K], <g_i, g_j>.
        orders: K orders of 0..K-1.

    Returns:
        [K] coefficients c with sum_j c_j g_j = sum_i g_i'.
    """
    mix = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for i, order in enumerate(orders):
        for j in order:
            if j != i:
                length = gram[j, j]
                apart = (mix[i] @ gram[:, j]).clamp_max(0)
                mix[i, j] -= torch.where(length > 0, apart / length, 0)
    return mix.sum(0)
