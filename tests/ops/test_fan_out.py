"""Tests of fan_out alone: independence of the horizons, and the gradient monitor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import backends_of, device_of, interpreted

from mfwm_kernels import GradMonitor, Horizons, fan_out, multi_horizon_linear, use_backend

BACKENDS = backends_of("fan_out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropping_a_horizon_leaves_the_others_bit_equal(backend: str) -> None:
    """Outputs, and the gradients of each horizon's own weights. Triton is exempt from the latter: its sums over tokens
    depend on a program's block, which is as wide as the largest pool."""
    # Triton's interpreter takes a second for one clip on a grid of 8 x 8, as small as the largest pool allows.
    clips, height = (1, 8) if interpreted(backend) else (2, 16)
    hidden, actions = torch.randn(clips, 4, height, 8, 16), torch.randn(clips, 4, 16)
    horizons, norms, gates = (1, 2, 4, 8), torch.randn(4, 16), torch.randn(4, 8, 16)
    upstream = [torch.randn(clips, 4, height // p, 8 // p, 16) for p in horizons]

    def results_of(*chosen: int) -> list[torch.Tensor]:
        offsets = tuple(horizons[i] for i in chosen)
        norm = norms[list(chosen)].requires_grad_()
        gate = gates[list(chosen), : max(offsets)].contiguous().requires_grad_()
        states = fan_out(
            hidden, actions, Horizons(offsets, offsets), pool=offsets, norm_weight=norm, lag_weight=gate
        )  # fmt: skip
        norm_gradient, gate_gradient = torch.autograd.grad(states, (norm, gate), [upstream[i] for i in chosen])
        return [*states, *norm_gradient.unbind(), *gate_gradient[:, :4].unbind()]

    with use_backend(backend):
        every, three, two = results_of(0, 1, 2, 3), results_of(0, 1, 2), results_of(0, 2)
    for results, chosen in ((three, (0, 1, 2)), (two, (0, 2))):
        same = [every[4 * part + i] for part in range(1 if backend == "triton" else 3) for i in chosen]
        assert all(torch.equal(a, b) for a, b in zip(results, same, strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pool", "grid"),
    [((1, 2, 4, 16), (16, 16)), ((1, 3, 6), (6, 12)), ((12, 4), (12, 12)), ((1, 1), (7, 10)), ((1, 1, 4), (4, 12))],
)
def test_any_pools(backend: str, pool: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Blocks of several tiles, tiles with fewer cells than rows, and pools that do not divide each other."""
    horizons = Horizons((1, 2, 4, 8)[: len(pool)], pool)
    hidden = torch.randn(1, 2, *grid, 8, requires_grad=True)
    actions, norm = torch.randn(1, 3, 8, requires_grad=True), torch.randn(len(pool), 8, requires_grad=True)
    upstream = [torch.randn(1, 2, grid[0] // p, grid[1] // p, 8) for p in pool]

    def results(backend: str) -> list[torch.Tensor]:
        with use_backend(backend):
            states = fan_out(hidden, actions, horizons, pool=pool, norm_weight=norm)
            return [*states, *torch.autograd.grad(states, (hidden, actions, norm), upstream)]

    for got, want in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "scale"), [("rms", None), ("rms", [0.5, 2.0, -1.0]), ("layer", [0.5, 2.0, -1.0])])
def test_grad_monitor(backend: str, norm: str, scale: list[float] | None) -> None:
    """Norms and cosines equal those of gradients that are computed one horizon at a time."""
    horizons, pool = Horizons((1, 2, 4), (1, 2, 4)), (1, 2, 4)
    hidden = torch.randn(2, 5, 4, 8, 16, requires_grad=True)
    actions = torch.randn(2, 5, 16, requires_grad=True)
    given = {"norm": norm, "norm_weight": torch.randn(16), "norm_bias": torch.randn(16) if norm == "layer" else None}
    with use_backend("reference"):
        outputs = fan_out(hidden, actions, horizons, pool=pool, **given)
        upstream = [torch.randn_like(output) for output in outputs]
        separate = [
            torch.autograd.grad(o, (hidden, actions), g, retain_graph=True, allow_unused=True)
            for o, g in zip(outputs, upstream, strict=True)
        ]
    rows = torch.stack([gradient[0].flatten() for gradient in separate])
    monitor = GradMonitor(3, scale)
    with use_backend(backend):
        outputs = fan_out(hidden, actions, horizons, pool=pool, **given, grad_monitor=monitor)
        hidden_gradient, actions_gradient = torch.autograd.grad(outputs, (hidden, actions), upstream)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(monitor.norms, norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(monitor.cosines, rows @ rows.T / norms[:, None] / norms, rtol=1e-4, atol=1e-5)
    factors = torch.tensor(scale or [1.0] * 3)
    torch.testing.assert_close(hidden_gradient.flatten(), (factors[:, None] * rows).sum(0), rtol=1e-4, atol=1e-5)
    # `scale` changes only the gradient of hidden.
    torch.testing.assert_close(actions_gradient, sum(g[1] for g in separate if g[1] is not None), rtol=1e-4, atol=1e-5)


def test_grad_monitor_of_the_linear_heads() -> None:
    hidden, actions = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 3, 8)
    monitor = GradMonitor(2)
    heads = [torch.randn(5, 8), torch.zeros(5, 8)]
    outputs = multi_horizon_linear(hidden, actions, heads, Horizons((1, 2), (1, 1)), grad_monitor=monitor)
    sum(output.sum() for output in outputs).backward()
    assert monitor.norms[0] > 0 and monitor.norms[1] == 0
    # The cosine of a zero gradient is 0, not NaN.
    torch.testing.assert_close(monitor.cosines, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("op", [fan_out, multi_horizon_linear], ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitor_is_written_by_each_backward(backend: str, op: Any) -> None:
    """Two calls share a monitor, and the backward runs twice."""
    horizons, monitor = Horizons((1, 2), (1, 1)), GradMonitor(2)
    hidden, actions = torch.randn(1, 3, 2, 2, 8, requires_grad=True), torch.randn(1, 3, 8)
    given: dict[str, Any] = {"pool": (1, 1)} if op is fan_out else {"weights": [torch.randn(4, 8) for _ in range(2)]}
    with use_backend(backend):
        outputs = [
            *op(hidden, actions, horizons=horizons, grad_monitor=monitor, **given),
            *op(hidden, actions, horizons=horizons, grad_monitor=monitor, **given),
        ]
        loss = sum(output.square().sum() for output in outputs)
        loss.backward(retain_graph=True)
        once = monitor.norms.clone()
        loss.backward()
    assert (once > 0).all() and torch.equal(once, monitor.norms)


@pytest.mark.parametrize("op", [fan_out, multi_horizon_linear], ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitors_scale_has_any_stride(backend: str, op: Any) -> None:
    hidden, actions = torch.randn(1, 3, 2, 2, 8, requires_grad=True), torch.randn(1, 3, 8)
    given: dict[str, Any] = {"pool": (1, 1)} if op is fan_out else {"weights": [torch.randn(4, 8) for _ in range(2)]}

    def gradient(scale: torch.Tensor) -> torch.Tensor:
        monitor = GradMonitor(2, scale)
        with use_backend(backend):
            outputs = op(hidden, actions, horizons=Horizons((1, 2), (1, 1)), grad_monitor=monitor, **given)
        return torch.autograd.grad(sum(output.square().sum() for output in outputs), hidden)[0]

    dense = torch.tensor([2.0, 3.0])
    assert torch.equal(gradient(torch.tensor([2.0, 9.0, 3.0, 9.0])[::2]), gradient(dense))
    assert torch.equal(gradient(dense[:1].expand(2)), gradient(torch.tensor([2.0, 2.0])))


# Not named "backend", for which conftest sets a default device, which torch.compile cannot trace.
@pytest.mark.parametrize("compiled_backend", [b for b in BACKENDS if not interpreted(b)])
def test_a_monitor_without_a_hidden_gradient_stays_as_it_was(compiled_backend: str) -> None:
    device = device_of(compiled_backend)
    monitor = GradMonitor(2, device=device)
    hidden = torch.randn(1, 3, 2, 2, 8, device=device)
    actions = torch.randn(1, 3, 8, device=device, requires_grad=True)

    def loss(hidden: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        outputs = fan_out(hidden, actions, Horizons((1, 3), (1, 2)), pool=(1, 2), grad_monitor=monitor)
        return outputs[0].square().sum() + outputs[1].square().sum()

    with use_backend(compiled_backend):
        loss(hidden, actions).backward()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, actions).backward()
    assert not monitor.norms.any() and not monitor.cosines.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_actions_of_another_episode_may_be_nan(backend: str) -> None:
    hidden, gate = torch.randn(1, 4, 2, 2, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    actions, segments = torch.randn(1, 4, 8), torch.tensor([[0, 0, 1, 1]])
    actions[:, 2] = float("nan")  # which is in no window of its own episode
    with use_backend(backend):
        (output,) = fan_out(
            hidden, actions, Horizons((3,), (1,)), pool=(1,), lag_weight=gate, segment_ids=segments
        )  # fmt: skip
        gradients = torch.autograd.grad(output.sum(), (hidden, gate))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("bits", [0x7F81, 0x7FC0, 0x7FFF, -1])
def test_nan_of_any_bits_stays_nan_in_bf16(bits: int) -> None:
    """A NaN reaches its state and the pooled one, and the gradients."""
    hidden, actions = torch.randn(1, 1, 2, 2, 32).bfloat16(), torch.randn(1, 1, 32).bfloat16()
    hidden.view(torch.int16)[0, 0, 0, 1, 5] = bits
    hidden.requires_grad_()
    for norm in (None, torch.randn(32).bfloat16()):
        states = fan_out(hidden, actions, Horizons((1, 2), (1, 2)), pool=(1, 2), norm_weight=norm)
        (gradient,) = torch.autograd.grad([states[0].sum(), states[1].sum()], hidden)
        where = torch.zeros(1, 1, 2, 2, 32, dtype=torch.bool)
        where[0, 0, 0, 1, slice(5, 6) if norm is None else slice(None)] = True
        assert torch.equal(states[0].isnan(), where)
        assert torch.equal(states[1].isnan(), where[:, :, :1, 1:])
        assert bool(gradient.isnan().all()) == (norm is not None)
        upstream = torch.ones_like(states[0].detach())
        upstream.view(torch.int16)[0, 0, 1, 0, 3] = bits
        clean = torch.randn(1, 1, 2, 2, 32).bfloat16().requires_grad_()
        (state,) = fan_out(clean, actions, Horizons.next_frame(), pool=(1,), norm_weight=norm)
        assert torch.autograd.grad(state, clean, upstream)[0][0, 0, 1, 0].isnan().any()


def test_parameters_in_fp32_under_autocast() -> None:
    hidden, actions, norm = torch.randn(1, 3, 2, 2, 8).bfloat16(), torch.randn(1, 3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        (output,) = fan_out(hidden, actions, Horizons((2,), (1,)), pool=(1,), norm_weight=norm)
    (want,) = fan_out(hidden, actions.bfloat16(), Horizons((2,), (1,)), pool=(1,), norm_weight=norm.bfloat16())
    assert output.dtype == torch.bfloat16 and torch.equal(output, want)
