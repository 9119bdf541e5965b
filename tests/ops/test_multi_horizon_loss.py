"""Tests of multi_horizon_loss alone: what does not count, loss scales, and weights that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import backends_of, device_of
from torch import Tensor

from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
from mfwm_kernels.check import relative_error

BACKENDS = backends_of("multi_horizon_loss")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "charbonnier"])
def test_what_does_not_count_may_be_nan(backend: str, kind: str) -> None:
    """Positions whose frame is past the end or in another episode affect neither loss nor gradients."""
    device = device_of(backend)
    horizons = Horizons((1, 2), (1, 2))
    preds = [torch.randn(1, 5, 2, 4 // f, 4 // f, device=device) for f in (1, 2)]
    video = torch.randn(1, 5, 2, 4, 4, device=device)
    segments = torch.tensor([[0, 0, 0, 0, 1]], device=device)
    with use_backend(backend):
        want = loss_and_gradients(preds, video, horizons, kind, segments)
        preds[0][:, 3:] = float("nan")
        preds[1][:, 2:] = float("inf")
        video[:, 4] = float("nan")
        got = loss_and_gradients(preds, video, horizons, kind, segments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def loss_and_gradients(preds: list[Tensor], video: Tensor, horizons: Horizons, kind: str, segments: Tensor) -> Any:
    preds = [pred.detach().requires_grad_() for pred in preds]
    loss = multi_horizon_loss(
        preds, video, horizons, kind=kind, consistency_weights=[0, 0.5], segment_ids=segments, eps=0.1, detach=None
    )
    return [loss.total.detach(), loss.per_horizon, *torch.autograd.grad(loss.total, preds)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_survive_a_loss_scale(backend: str, compiled: bool) -> None:
    """1 / 786,432 is subnormal in fp16, but the scale raises it before it is rounded to fp16. Here 12,288 elements have
    a weight of 1 / 64: the same, in a sixty-fourth of the time."""
    if backend == "triton" and compiled:
        pytest.skip("Triton's interpreter is not traceable")
    device = device_of(backend)
    pred = torch.randn(2, 8, 3, 16, 16, device=device).half().requires_grad_()
    video, weight = torch.randn(2, 9, 3, 16, 16, device=device), 0.05 / 64

    def scaled(pred: Tensor, video: Tensor) -> Tensor:
        return multi_horizon_loss([pred], video, Horizons.next_frame(), horizon_weights=[weight]).total * 65536

    with use_backend(backend):
        loss = torch.compile(scaled, fullgraph=True, backend="aot_eager") if compiled else scaled
        (got,) = torch.autograd.grad(loss(pred, video), pred)
    want = 65536 * weight * 2 * (pred.detach().double() - video[:, 1:].double()) / pred.numel()
    assert got.dtype == torch.float16
    assert relative_error(got, want) < 1e-3


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled module")
def test_compiled_by_inductor_with_channels_innermost() -> None:
    video = torch.randint(0, 256, (2, 5, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    base = torch.randn(2, 4, 8, 8, 3, requires_grad=True)

    def loss(base: Tensor, video: Tensor) -> Tensor:
        return multi_horizon_loss([base.permute(0, 1, 4, 2, 3) * 2], video, Horizons.next_frame()).total

    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(base, video), base)
    (want,) = torch.autograd.grad(loss(base, video), base)
    assert relative_error(got, want) < 1e-6


def test_lists_of_weights_are_exact_in_fp64() -> None:
    pred, video = torch.randn(1, 3, 1, 4, 4, dtype=torch.float64), torch.randn(1, 4, 1, 4, 4)
    for backend in BACKENDS:
        if backend in ("reference", "cpu"):
            with use_backend(backend):
                loss = multi_horizon_loss([pred], video, Horizons.next_frame(), horizon_weights=[0.3])
            assert abs(float(loss.total / (0.3 * loss.per_horizon[0])) - 1) < 1e-14


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_pair_that_cannot_be_computed_in_a_tensor_that_cannot_be_read(weight: float) -> None:
    """Factors (2, 1), where the near prediction is coarser than the far one and cannot be pooled to its size."""
    preds = [torch.randn(1, 4, 1, 4, 4), torch.randn(1, 4, 1, 8, 8)]
    video, weights = torch.randn(1, 4, 1, 8, 8), torch.tensor([0.0, weight])

    def total(weights: Tensor) -> Tensor:
        return multi_horizon_loss(preds, video, Horizons((1, 2), (2, 1)), consistency_weights=weights).total

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(weights)
    if weight == 0:
        assert compiled == total(weights)
    else:
        assert compiled.isnan()
        with pytest.raises(ValueError, match=r"consistency_weights\[1\] must be 0: factors\[1\] = 1"):
            total(weights)


def test_activations_in_bf16_and_parameters_in_fp32_under_autocast() -> None:
    preds = [torch.randn(1, 3, 1, 4, 4).bfloat16(), torch.randn(1, 3, 1, 2, 2)]
    video = torch.randn(1, 4, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = multi_horizon_loss(preds, video, Horizons((1, 2), (1, 2)))
    want = multi_horizon_loss([pred.bfloat16() for pred in preds], video, Horizons((1, 2), (1, 2)))
    assert torch.equal(loss.total, want.total)
