"""Weights of horizons that are learned or balanced, and surgery on gradients that conflict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfwm_kernels import GradMonitor

# Of the running mean of gradient norms: the last seven steps make up half of it.
DECAY = 0.9


class Uncertainty(nn.Module):
    """Weights w_i exp(-s_i), s_i learned: total = sum_i w_i (exp(-s_i) loss_i + s_i) (Kendall et al., 1705.07115).

    s_i is the log variance of horizon i's error. The total is least where s_i is the log of the loss, so the weight of
    a horizon grows with how well it can be predicted.
    """

    fixed: Tensor

    def __init__(self, weights: Sequence[float]):
        super().__init__()
        self.register_buffer("fixed", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(len(weights), dtype=torch.float32))

    def weights(self) -> Tensor:
        return self.fixed * torch.exp(-self.log_variance)

    def cost(self, shares: Tensor) -> Tensor:
        """sum_i share_i w_i s_i. The share is 1 for a horizon that counted anywhere and 0 for others, which have no
        error, or it is a part's share of a larger batch."""
        return (self.fixed * self.log_variance * shares).sum()


class GradientNorms(nn.Module):
    """Scales that give each horizon its share of the gradient into the shared hidden state.

    scale_i * norm_i is proportional to shares_i, and the scaled norms add up to the unscaled ones. The norms are a
    running mean of those that GradMonitor collects; a backward's norms take effect in the next forward.
    """

    shares: Tensor
    last: Tensor
    mean: Tensor

    def __init__(self, shares: Sequence[float]):
        super().__init__()
        self.register_buffer("shares", torch.tensor(shares), persistent=False)
        # Both are in checkpoints, so that a resumed run continues with the norms of the step before it.
        self.register_buffer("last", torch.zeros(len(shares)))
        self.register_buffer("mean", torch.zeros(len(shares)))

    def attach(self, monitor: GradMonitor) -> None:
        """Set the monitor's scale, and make it write its norms here."""
        first = (self.mean == 0) & (self.last > 0)
        mixed = torch.lerp(self.last, self.mean, DECAY)
        self.mean.copy_(torch.where(self.last > 0, mixed.where(~first, self.last), self.mean))
        self.last.zero_()
        known = self.mean > 0
        shares = self.shares * known
        scale = shares * self.mean.sum() / shares.sum() / self.mean
        monitor.scale = torch.where(known, scale, 1.0)
        monitor.norms = self.last


def times_shares(weights: Tensor | Sequence[Any] | None, shares: Tensor) -> Tensor:
    """Weights [K] (None: ones) or [K, K], times shares of the same shape."""
    return shares if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=shares.device) * shares


def surgery_scale(gram: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad (Yu et al., arXiv 2001.06782) of gradients g_i from their dot products alone.

    For each other j in the order orders[i], g_i loses its component along g_j if their dot product is negative:
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
                conflict = (mix[i] @ gram[:, j]).clamp_max(0)
                mix[i, j] -= torch.where(length > 0, conflict / length, 0)
    return mix.sum(0)


def set_surgery_scale(monitor: GradMonitor, measured: GradMonitor, *, balanced: bool) -> None:
    """Set the monitor's scale to surgery, in random order, on the `measured` gradients, as its scale balances them if
    they are `balanced`."""
    scale = monitor.scale if balanced and monitor.scale is not None else torch.ones_like(measured.norms)
    lengths = measured.norms * scale
    gram = measured.cosines * lengths[:, None] * lengths
    orders = [torch.randperm(len(lengths)).tolist() for _ in lengths]
    monitor.scale = scale * surgery_scale(gram, orders)
