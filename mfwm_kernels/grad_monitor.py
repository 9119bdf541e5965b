"""GradMonitor, which measures whether the horizons pull the shared hidden state in the same direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments as check


class GradMonitor:
    """Collects, in the backward pass of fan_out or multi_horizon_linear, each horizon's gradient at the hidden state.

    With g_i the gradient that horizon i sends to `hidden`:

        norms[i]      = ||g_i||
        cosines[i, j] = <g_i, g_j> / (||g_i|| ||g_j||)        (0 where a norm is 0)
        d hidden      = sum_i scale[i] * g_i

    norms and cosines describe the unscaled gradients, in fp32; each backward overwrites them in place. `scale` changes
    only the gradient of the hidden state, not those of actions and weights.

    Args:
        K: number of horizons.
        scale: [K] tensor (fp32 or fp64) or list of numbers; None leaves the gradients as they are. Not differentiable.
        device: of norms and cosines, by default the CPU or that of `scale`; the first call moves them to the hidden
            state's.

    >>> monitor = GradMonitor(4)                                          # doctest: +SKIP
    >>> states = fan_out(hidden, actions, horizons, pool=(1, 2, 4, 8), grad_monitor=monitor)
    >>> loss(states).backward(); print(monitor.cosines)
    """

    def __init__(self, K: int, scale: Tensor | list[float] | None = None, *, device: torch.device | str | None = None):
        K = check.integer("K", K, least=1)
        if device is None:
            # Not torch's default device, which may be "meta". A call moves the monitor to its hidden state's device.
            device = scale.device if isinstance(scale, Tensor) else "cpu"
        self.norms = torch.zeros(K, dtype=torch.float32, device=device)
        self.cosines = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.scale: Tensor | None = None
        if scale is not None:
            numbers = check.horizon_weights("scale", scale, [(K,)], self.norms)
            # A list was turned into a cached tensor (arguments.constant) that other calls share: clone it, so that
            # writing to .scale is safe.
            self.scale = numbers.detach() if isinstance(scale, Tensor) else numbers.clone()

    def __repr__(self) -> str:
        if self.norms.is_meta:
            return f"GradMonitor({len(self.norms)}, device='meta')"
        scale = "" if self.scale is None else f", scale={self.scale.tolist()}"
        norms, cosines = (
            [[round(x, 4) for x in row] for row in figures.tolist()] for figures in (self.norms[None], self.cosines)
        )
        return f"GradMonitor({len(self.norms)}{scale}, norms={norms[0]}, cosines={cosines})"


def monitor_fields(monitor: GradMonitor | None, count: int, hidden: Tensor) -> tuple[Tensor | None, ...]:
    """(scale, norms, cosines) as an op takes them, after moving the monitor to the hidden state's device."""
    if monitor is None:
        return None, None, None
    if not isinstance(monitor, GradMonitor):
        raise TypeError(f"grad_monitor must be a GradMonitor, got {type(monitor).__name__}")
    if monitor.norms.shape[0] != count:
        raise ValueError(f"grad_monitor must have K = {count}, one entry per horizon; got K = {monitor.norms.shape[0]}")
    if monitor.norms.device != hidden.device:
        monitor.norms, monitor.cosines = monitor.norms.to(hidden.device), monitor.cosines.to(hidden.device)
        monitor.scale = None if monitor.scale is None else monitor.scale.to(hidden.device)
    return monitor.scale, monitor.norms, monitor.cosines


def write_gram(gram: Tensor, norms: Tensor, cosines: Tensor) -> None:
    """Write norms and cosines, given the K x K matrix of dot products."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    norms.copy_(lengths)
    product = lengths[:, None] * lengths[None, :]
    cosines.copy_(torch.where(product > 0, gram / product.where(product > 0, 1), 0))


class _Branches(torch.autograd.Function):
    """K views of one tensor, whose backward receives the K gradients stacked."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int, scale: Tensor | None, norms: Tensor, cosines: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        # Kept outside save_for_backward: each backward overwrites them, which autograd would report as an error.
        ctx.norms, ctx.cosines = norms, cosines
        return hidden.unsqueeze(0).expand(count, *hidden.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        rows = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
        write_gram(rows @ rows.T, ctx.norms, ctx.cosines)
        if scale is not None:
            rows = rows * scale[:, None]
        return rows.sum(0).view(gradient.shape[1:]).to(gradient.dtype), None, None, None, None


def branches(
    hidden: Tensor, count: int, scale: Tensor | None, norms: Tensor | None, cosines: Tensor | None
) -> tuple[Tensor, ...]:
    """`hidden` K times; the backward writes norms and cosines if they are given."""
    if norms is None or cosines is None:
        return (hidden,) * count
    return _Branches.apply(hidden, count, scale, norms, cosines).unbind(0)
