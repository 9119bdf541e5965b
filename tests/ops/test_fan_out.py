"""What is particular to fan_out: independence of the horizons, and the gradient monitor."""

from __future__ import annotations

import pytest
import torch

from mfwm_kernels import GradMonitor, Horizons, fan_out, multi_horizon_linear, use_backend
from mfwm_kernels.registry import ABSENT, OPS

BACKENDS = ["reference", *(b for b in OPS["fan_out"].backends if not ABSENT[b])]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or not torch.cuda.is_available()])
def test_dropping_a_horizon_leaves_the_others_bit_equal(backend: str) -> None:
    hidden, actions, norm = torch.randn(2, 4, 4, 4, 16), torch.randn(2, 4, 16), torch.randn(16)
    with use_backend(backend):
        every = fan_out(hidden, actions, Horizons((1, 2, 4), (1, 2, 4)), pool=(1, 2, 4), norm_weight=norm)
        two = fan_out(hidden, actions, Horizons((1, 4), (1, 4)), pool=(1, 4), norm_weight=norm)
    assert torch.equal(every[0], two[0]) and torch.equal(every[2], two[1])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or not torch.cuda.is_available()])
@pytest.mark.parametrize("scale", [None, [0.5, 2.0, -1.0]])
def test_grad_monitor(backend: str, scale: list[float] | None) -> None:
    """Norms and cosines of each horizon's own gradient, found one horizon at a time."""
    horizons, pool = Horizons((1, 2, 4), (1, 2, 4)), (1, 2, 4)
    hidden = torch.randn(2, 5, 4, 8, 16, requires_grad=True)
    actions, norm = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16)
    with use_backend("reference"):
        outputs = fan_out(hidden, actions, horizons, pool=pool, norm_weight=norm)
        upstream = [torch.randn_like(output) for output in outputs]
        each = [
            torch.autograd.grad(o, (hidden, actions), g, retain_graph=True, allow_unused=True)
            for o, g in zip(outputs, upstream, strict=True)
        ]
    rows = torch.stack([gradient[0].flatten() for gradient in each])
    monitor = GradMonitor(3, scale)
    with use_backend(backend):
        outputs = fan_out(hidden, actions, horizons, pool=pool, norm_weight=norm, grad_monitor=monitor)
        hidden_gradient, actions_gradient = torch.autograd.grad(outputs, (hidden, actions), upstream)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(monitor.norms, norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(monitor.cosines, rows @ rows.T / norms[:, None] / norms, rtol=1e-4, atol=1e-5)
    factors = torch.tensor(scale or [1.0] * 3)
    torch.testing.assert_close(hidden_gradient.flatten(), (factors[:, None] * rows).sum(0), rtol=1e-4, atol=1e-5)
    # The scale acts on the trunk alone.
    torch.testing.assert_close(actions_gradient, sum(g[1] for g in each if g[1] is not None), rtol=1e-4, atol=1e-5)


def test_grad_monitor_of_the_linear_heads() -> None:
    hidden, actions = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 3, 8)
    monitor = GradMonitor(2)
    heads = [torch.randn(5, 8), torch.zeros(5, 8)]
    outputs = multi_horizon_linear(hidden, actions, heads, Horizons((1, 2), (1, 1)), grad_monitor=monitor)
    sum(output.sum() for output in outputs).backward()
    assert monitor.norms[0] > 0 and monitor.norms[1] == 0
    # A horizon that sends nothing has no direction: 0, not NaN.
    torch.testing.assert_close(monitor.cosines, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
