"""Compares the accuracy of conditioned states and their heads with plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted, kernels_of
from torch import Tensor

from mfwm_kernels import Horizons, fan_out, multi_horizon_linear, use_backend
from mfwm_kernels.check import relative_error

pytestmark = pytest.mark.usefixtures("size")

BACKENDS = kernels_of("fan_out")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROUNDED = [(b, dtype) for b in BACKENDS for dtype in ([FLOAT32] if interpreted(b) else [FLOAT32, BFLOAT16])]
HORIZONS = Horizons((1, 2, 4), (1, 1, 1))


def plain_states(hidden: Tensor, actions: Tensor, norm_weight: Tensor) -> list[Tensor]:
    """The usual code: add each horizon's sum of actions, and norm."""
    states, positions = [], hidden.shape[1]
    for offset in HORIZONS.offsets:
        window = torch.zeros_like(actions[:, :positions])
        for lag in range(1, offset):
            window = window + actions[:, lag : lag + positions]
        states.append(F.rms_norm(hidden + window[:, :, None], hidden.shape[-1:], norm_weight, 1e-6))
    return states


def plain_heads(hidden: Tensor, actions: Tensor, norm_weight: Tensor, *weights: Tensor) -> list[Tensor]:
    return [F.linear(s, w) for s, w in zip(plain_states(hidden, actions, norm_weight), weights, strict=True)]


def our_states(hidden: Tensor, actions: Tensor, norm_weight: Tensor) -> Sequence[Tensor]:
    return fan_out(hidden, actions, HORIZONS, pool=(1, 1, 1), norm_weight=norm_weight)


def our_heads(hidden: Tensor, actions: Tensor, norm_weight: Tensor, *weights: Tensor) -> Sequence[Tensor]:
    return multi_horizon_linear(hidden, actions, list(weights), HORIZONS, norm_weight=norm_weight)


def results(op: Any, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = op(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in upstream])]


def inputs(scale: float, dtype: torch.dtype, heads: bool) -> tuple[list[Tensor], list[Tensor]]:
    columns = (24, 12, 5)
    leaves = [torch.randn(2, 3, 8, 64), scale * torch.randn(2, 7, 64), 1 + 0.1 * torch.randn(64)]
    leaves += [torch.randn(n, 64) for n in columns] if heads else []
    upstream = [torch.randn(2, 3, 8, n if heads else 64).to(dtype) for n in columns]
    return [leaf.to(dtype) for leaf in leaves], upstream


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("heads", [False, True], ids=["fan_out", "multi_horizon_linear"])
@pytest.mark.parametrize(("backend", "dtype"), ROUNDED)
def test_at_most_twice_the_error_of_plain_torch(backend: str, heads: bool, dtype: torch.dtype, scale: float) -> None:
    leaves, upstream = inputs(scale, dtype, heads)
    ours, plain = (our_heads, plain_heads) if heads else (our_states, plain_states)
    exact = results(plain, [leaf.double() for leaf in leaves], upstream)
    with use_backend(backend):
        found = results(ours, leaves, upstream)
    for k, (got, other, right) in enumerate(zip(found, results(plain, leaves, upstream), exact, strict=True)):
        error, allowed = relative_error(got, right), relative_error(other, right)
        assert error <= 2 * allowed + 1e-7, f"result {k}: relative error {error:.1e}, plain {allowed:.1e}"


@pytest.mark.parametrize(("backend", "dtype"), ROUNDED)
def test_actions_that_nearly_cancel_the_hidden_state(backend: str, dtype: torch.dtype) -> None:
    """hidden + action is a thousandth of hidden. The state is computed directly. The heads add two products, each
    rounded, so with the dtype's eps their relative error is at most 2 eps |hidden| / |hidden + action|."""
    leaves, upstream = inputs(1.0, dtype, True)
    hidden, actions = leaves[:2]
    actions[:, 1:4] = (-0.999 * hidden[:, :, 0].double()).to(dtype)
    hidden.copy_(hidden[:, :, :1].clone().expand_as(hidden))
    state = hidden.double() + actions[:, 1:4, None].double()
    growth = float(hidden.double().norm() / state.norm())
    with use_backend(backend):
        states, heads = our_states(*leaves[:3])[1], results(our_heads, leaves, upstream)
    assert all(bool(value.isfinite().all()) for value in heads)
    doubled = [leaf.double() for leaf in leaves]
    eps = torch.finfo(dtype).eps
    assert relative_error(states, plain_states(*doubled[:3])[1]) <= eps
    assert relative_error(heads[1].detach(), plain_heads(*doubled)[1]) <= 2 * eps * growth


@pytest.mark.parametrize("deviations", [0.0, 20.0, 100.0])
@pytest.mark.parametrize("heads", [False, True], ids=["fan_out", "multi_horizon_linear"])
@pytest.mark.parametrize(("backend", "dtype"), ROUNDED)
def test_layer_norm_of_rows_with_a_large_mean(backend: str, heads: bool, dtype: torch.dtype, deviations: float) -> None:
    """Hidden and condition have a mean of many deviations, each row of hidden its own. Against the formula in fp64, at
    most twice the error of the reference in the same dtype, plus what fp32 sums of such rows lose."""
    columns, width = (24, 12, 5), 132
    mean = deviations * torch.randn(1, 3, 4, 1).sign() + deviations * torch.rand(1, 3, 4, 1)
    leaves = [torch.randn(1, 3, 4, width) + mean, torch.randn(1, 7, width), torch.randn(1, 3, 3, width) + deviations]
    leaves += [torch.randn(3, width), torch.randn(3, width)]
    leaves += [torch.randn(n, width) / width**0.5 for n in columns] if heads else []
    leaves = [leaf.to(dtype) for leaf in leaves]
    # Gradients whose sums over rows are large too.
    upstream = [(torch.randn(1, 3, 4, n if heads else width) + 1).to(dtype) for n in columns]

    def ours(
        hidden: Tensor, actions: Tensor, condition: Tensor, weight: Tensor, bias: Tensor, *weights: Tensor
    ) -> Sequence[Tensor]:
        given: dict[str, Any] = {"condition": condition, "norm": "layer", "norm_weight": weight, "norm_bias": bias}
        if heads:
            return multi_horizon_linear(hidden, actions, list(weights), HORIZONS, **given)
        return fan_out(hidden, actions, HORIZONS, pool=(1, 1, 1), **given)

    def formula(
        hidden: Tensor, actions: Tensor, condition: Tensor, weight: Tensor, bias: Tensor, *weights: Tensor
    ) -> list[Tensor]:
        states = []
        for i, offset in enumerate(HORIZONS.offsets):
            state = hidden + condition[:, :, None, i]
            for lag in range(1, offset):
                state = state + actions[:, lag : lag + hidden.shape[1], None]
            states.append(F.layer_norm(state, (width,), weight[i], bias[i], 1e-6))
        return [F.linear(s, w) for s, w in zip(states, weights, strict=True)] if heads else states

    exact = results(formula, [leaf.double() for leaf in leaves], upstream)
    with use_backend("reference"):
        reference = results(ours, leaves, upstream)
    with use_backend(backend):
        found = results(ours, leaves, upstream)
    for k, (got, other, right) in enumerate(zip(found, reference, exact, strict=True)):
        error, allowed = relative_error(got, right), relative_error(other, right)
        allowed = 2 * allowed + 4 * torch.finfo(FLOAT32).eps * (1 + deviations)
        assert error <= allowed, f"result {k}: relative error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("heads", [False, True], ids=["fan_out", "multi_horizon_linear"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_grid_is_a_view(backend: str, heads: bool) -> None:
    """Tokens in row order with a grid give what the grid itself gives, in their own layout, gradients included."""
    states, actions = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 4, 8)
    # As a model without a class token slices it.
    tokens = torch.cat([torch.randn(2, 3, 1, 8), states.flatten(2, 3)], 2)[:, :, 1:]
    upstream = [torch.randn(2, 3, 24 if heads else 24 // p**2, 8) for p in (1, 1, 2)]
    given: dict[str, Any] = {"norm": "layer", "norm_weight": torch.randn(8), "norm_bias": torch.randn(3, 8)}
    if heads:
        op, given = multi_horizon_linear, {**given, "weights": [torch.randn(8, 8) for _ in range(3)]}
    else:
        op, given = fan_out, {**given, "pool": (1, 1, 2)}
    found = []
    with use_backend(backend):
        for hidden, grid in ((states, None), (tokens, (4, 6))):
            hidden.requires_grad_()
            outputs = op(hidden, actions, horizons=HORIZONS, grid=grid, **given)
            outputs = [output.flatten(2, -2) for output in outputs] if grid is None else outputs
            found.append([*outputs, torch.autograd.grad(outputs, hidden, upstream)[0].flatten(2, -2)])
    assert [tuple(output.shape) for output in found[1][:3]] == [tuple(g.shape) for g in upstream]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("depth", "grid", "horizons"), [(8, 64, 2), (24, 1, 8), (1000, 2, 3), (8192, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_width_grid_and_number_of_horizons(backend: str, depth: int, grid: int, horizons: int) -> None:
    grid = min(grid, 8) if interpreted(backend) else grid
    chosen = Horizons(tuple(range(1, horizons + 1)), (1,) * horizons)
    leaves = [torch.randn(1, 2, grid, grid, depth), torch.randn(1, 9, depth), torch.randn(depth)]

    def states(hidden: Tensor, actions: Tensor, norm_weight: Tensor) -> Sequence[Tensor]:
        pool = tuple(min(grid, 1 << i) for i in range(horizons))
        return fan_out(hidden, actions, chosen, pool=pool, norm_weight=norm_weight)

    with use_backend("reference"):
        upstream = [torch.randn_like(state) for state in states(*leaves)]
        exact = results(states, [leaf.double() for leaf in leaves], upstream)
    with use_backend(backend):
        found = results(states, leaves, upstream)
    assert all(relative_error(got, right) <= 2e-5 for got, right in zip(found, exact, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_more_than_2_to_the_31_elements_apart(backend: str) -> None:
    """torch.empty never touches most of the tensor, so it occupies no memory: torch.zeros would write all 4 GB."""
    far = 2**31 + 64
    hidden = torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 1, 2, 16), (far, 32, 16, 1))
    hidden.copy_(torch.randn(hidden.shape))
    actions = torch.randn(2, 1, 16).bfloat16()
    with use_backend(backend):
        states = fan_out(hidden, actions, Horizons.next_frame(), pool=(1,))
    assert torch.equal(states[0], hidden)
