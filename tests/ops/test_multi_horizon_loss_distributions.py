"""Tests of multi_horizon_loss with distributions, motion_gain and position_weights, on every backend, against the
formulas of other code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of, device_of
from torch import Tensor

from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
from mfwm_kernels.check import relative_error

BACKENDS = backends_of("multi_horizon_loss")
NEXT = Horizons.next_frame()


def means_and_log_scales(*shape: int, backend: str) -> Tensor:
    """[B, T, 2 C, H, W], the latter between -2 and 2."""
    preds = torch.randn(*shape, device=device_of(backend))
    channels = shape[2] // 2
    preds[:, :, channels:] = preds[:, :, channels:].clamp(-2, 2)
    return preds


def loss_and_gradients(preds: list[Tensor], video: Tensor, horizons: Horizons, **options: Any) -> list[Tensor]:
    """For an upstream gradient of 3."""
    leaves = [pred.detach().requires_grad_() for pred in preds]
    loss = multi_horizon_loss(leaves, video, horizons, **options)
    return [
        loss.total.detach(),
        loss.per_horizon,
        *torch.autograd.grad(loss.total, leaves, torch.full_like(loss.total, 3)),
    ]


def formula(kind: str, mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
    if kind == "gaussian":
        return F.gaussian_nll_loss(mean, target, log_scale.exp(), reduction="none")
    log_likelihood = torch.distributions.Laplace(mean, log_scale.exp()).log_prob(target)
    return -log_likelihood - torch.tensor(2.0).log().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_likelihoods_are_those_of_torch(backend: str, kind: str) -> None:
    preds = means_and_log_scales(2, 3, 4, 4, 6, backend=backend)
    video = torch.randn(2, 4, 2, 4, 6, device=preds.device)
    leaf = preds.double().requires_grad_()
    want = formula(kind, leaf[:, :, :2], leaf[:, :, 2:], video[:, 1:].double()).mean()
    with use_backend(backend):
        total, _, got = loss_and_gradients([preds], video, NEXT, kind=kind)
    assert relative_error(total, want.detach()) < 1e-5
    assert relative_error(got, torch.autograd.grad(3 * want, leaf)[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_beta_1_the_mean_learns_as_with_mse(backend: str) -> None:
    preds = means_and_log_scales(1, 3, 4, 4, 4, backend=backend)
    video = torch.randn(1, 4, 2, 4, 4, device=preds.device)
    with use_backend(backend):
        *_, got = loss_and_gradients([preds], video, NEXT, kind="gaussian", beta=1.0)
        *_, mse = loss_and_gradients([preds[:, :, :2]], video, NEXT)
    assert relative_error(2 * got[:, :, :2], mse) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_log_scales_beyond_the_limit_are_clamped_and_do_not_learn(backend: str, kind: str) -> None:
    preds = means_and_log_scales(1, 2, 2, 2, 20, backend=backend)
    video = torch.randn(1, 3, 1, 2, 20, device=preds.device)
    beyond, at_limit = preds.clone(), preds.clone()
    for column, sign in ((3, 1), (18, -1)):
        at_limit[:, :, 1, :, column] = sign * 10.0
        beyond[:, :, 1, :, column] = sign * torch.tensor([10.001, 1e30], device=preds.device)
    with use_backend(backend):
        total, _, gradient = loss_and_gradients([beyond], video, NEXT, kind=kind, beta=0.5)
        total_at_limit, _, gradient_at_limit = loss_and_gradients([at_limit], video, NEXT, kind=kind, beta=0.5)
    assert torch.equal(total, total_at_limit) and torch.equal(gradient[:, :, 0], gradient_at_limit[:, :, 0])
    inside = torch.ones(20, dtype=torch.bool, device=preds.device)
    inside[[3, 18]] = False
    assert (gradient[:, :, 1, :, ~inside] == 0).all() and (gradient_at_limit[:, :, 1, :, ~inside] != 0).all()
    assert torch.equal(gradient[..., inside], gradient_at_limit[..., inside])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_a_nan_log_scale_reaches_all_but_its_own_gradient(backend: str, kind: str) -> None:
    """Like torch.clamp, whose gradient at NaN is 0. On the CPU the last element is after the last whole vector."""
    preds = means_and_log_scales(1, 2, 2, 2, 21, backend=backend)
    video = torch.randn(1, 3, 1, 2, 21, device=preds.device)
    video[0, 1, 0, 0, 3] = preds[0, 0, 0, 0, 3]  # a difference of 0
    is_nan = torch.zeros(1, 2, 2, 21, dtype=torch.bool, device=preds.device)
    is_nan[0, 0, 0, 3:5] = is_nan[0, 1, 1, -1] = True
    broken = preds.clone()
    broken[:, :, 1][is_nan] = float("nan")
    with use_backend(backend):
        *_, want = loss_and_gradients([preds], video, NEXT, kind=kind, beta=0.5)
        total, mean, got = loss_and_gradients([broken], video, NEXT, kind=kind, beta=0.5)
    assert total.isnan() and mean.isnan().all()
    assert got[:, :, 0][is_nan].isnan().all() and (got[:, :, 1][is_nan] == 0).all()
    kept = ~is_nan[:, :, None].expand_as(got)
    assert torch.equal(got[kept], want[kept])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
def test_what_moves_counts_for_more(backend: str, residual: bool) -> None:
    pred = torch.randn(2, 3, 2, 2, 3, device=device_of(backend))
    video = torch.randint(0, 256, (2, 5, 2, 4, 6), device=pred.device, dtype=torch.uint8)
    frames = F.avg_pool2d((video.double() / 127.5 - 1).flatten(0, 1), 2).unflatten(0, (2, 5))
    now, later = frames[:, :3], frames[:, 2:]
    leaf = pred.double().requires_grad_()
    difference = leaf + (now if residual else 0) - later
    want = (difference.abs() * (1 + 2.5 * (later - now).abs())).mean()
    with use_backend(backend):
        total, _, got = loss_and_gradients(
            [pred], video, Horizons((2,), (2,)), kind="l1", motion_gain=2.5, residual=residual
        )
    assert relative_error(total, want.detach()) < 1e-5
    assert relative_error(got, torch.autograd.grad(3 * want, leaf)[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mse", "gaussian"])
def test_position_weights_multiply_a_mean_over_what_counts(backend: str, kind: str) -> None:
    preds = means_and_log_scales(2, 3, 4 if kind == "gaussian" else 2, 2, 2, backend=backend)
    video = torch.randn(2, 4, 2, 2, 2, device=preds.device)
    weights = torch.tensor([[0.5, 0, 2], [0, 1, 0]], device=preds.device)
    leaf = preds.double().requires_grad_()
    target = video[:, 1:].double()
    losses = formula(kind, *leaf.chunk(2, 2), target) if kind == "gaussian" else (leaf - target).square()
    want = (losses.mean((2, 3, 4)) * weights).sum() / 3
    with use_backend(backend):
        for given in (weights, weights.double()[..., None], weights.t().contiguous().t()):
            total, _, got = loss_and_gradients([preds], video, NEXT, kind=kind, position_weights=given)
            assert relative_error(total, want.detach()) < 1e-5
            assert relative_error(got, torch.autograd.grad(3 * want, leaf, retain_graph=True)[0]) < 1e-5
        counts = multi_horizon_loss([preds], video, NEXT, kind=kind, position_weights=weights).counts
        none = loss_and_gradients([preds], video, NEXT, kind=kind, position_weights=torch.zeros_like(weights))
    assert counts.tolist() == [3 * 2 * 2 * 2]
    assert all((value == 0).all() for value in none)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mse", "gaussian", "laplace"])
def test_what_has_weight_0_may_be_nan(backend: str, kind: str) -> None:
    """Also the frames that only such positions use, and the consistency of what counts with what does not."""
    horizons = Horizons((1, 2), (1, 2))
    channels = 2 if kind == "mse" else 4
    device = device_of(backend)
    preds = [torch.randn(1, 5, channels, 4 // f, 4 // f, device=device) for f in (1, 2)]
    video = torch.randn(1, 7, 2, 4, 4, device=device)
    weights = torch.ones(1, 5, 2, device=device)
    weights[0, 3:] = 0
    weights[0, 1, 1] = 0
    options: dict[str, Any] = {
        "kind": kind, "position_weights": weights, "consistency_weights": [0, 0.5], "detach": None,
        "motion_gain": 0.5, "residual": True,
    }  # fmt: skip
    with use_backend(backend):
        want = loss_and_gradients(preds, video, horizons, **options)
        preds[0][:, 3:] = float("nan")
        preds[1][:, 3:] = float("inf")
        preds[1][:, 1] = float("nan")
        video[:, 5:] = float("nan")
        got = loss_and_gradients(preds, video, horizons, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.isfinite(value).all() for value in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_uses_the_kind_of_its_far_side_between_means(backend: str) -> None:
    near, far = torch.randn(1, 4, 2, 2, 2), means_and_log_scales(1, 4, 4, 2, 2, backend="reference")
    device = device_of(backend)
    video = torch.randn(1, 6, 2, 2, 2, device=device)
    horizons, weights = Horizons((1, 2), (1, 1)), torch.tensor([0.0, 1.0])
    difference = far[:, :3, :2].double() - near[:, 1:].double()
    with use_backend(backend):
        for kind, want in (("laplace", difference.abs().mean()), ("gaussian", difference.square().mean())):
            loss = multi_horizon_loss(
                [near.to(device), far.to(device)], video, horizons, kind=("huber", kind),
                consistency_weights=weights.to(device), beta=0.5, motion_gain=3.0,
            )  # fmt: skip
            assert relative_error(loss.consistency[1].cpu(), want) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_distributions_survive_a_loss_scale(backend: str) -> None:
    """As in test_fp16_gradients_survive_a_loss_scale: the gradient without the scale is subnormal in fp16."""
    preds = means_and_log_scales(2, 8, 6, 16, 16, backend=backend).half().requires_grad_()
    video, weight = torch.randn(2, 9, 3, 16, 16, device=preds.device), 0.05 / 64
    with use_backend(backend):
        loss = multi_horizon_loss([preds], video, NEXT, kind="gaussian", horizon_weights=[weight])
        (got,) = torch.autograd.grad(loss.total * 65536, preds)
    leaf = preds.detach().double().requires_grad_()
    want = formula("gaussian", leaf[:, :, :3], leaf[:, :, 3:], video[:, 1:].double()).mean() * weight * 65536
    assert got.dtype == torch.float16
    assert relative_error(got, torch.autograd.grad(want, leaf)[0]) < 1e-3
