"""Tests of multi_horizon_loss in Triton alone: horizons that take part in two launches."""

from __future__ import annotations

import pytest
import torch
from conftest import backends_of, device_of

from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
from mfwm_kernels.check import relative_error

pytestmark = pytest.mark.skipif("triton" not in backends_of("multi_horizon_loss"), reason="no Triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributions_whose_factors_do_not_divide_one_another(dtype: torch.dtype, poisoned_empty: None) -> None:
    """The launch for factors 1 and 3 adds to the gradient of the first means, and leaves its log-scales as they are."""
    device = device_of("triton")
    horizons = Horizons((1, 2, 3), (1, 2, 3))
    preds = [torch.randn(1, 3, 4, 6 // f, 6 // f, device=device).to(dtype) for f in horizons.factors]
    video = torch.randn(1, 5, 2, 6, 6, device=device)
    weights = torch.tensor([[[1.0, 0.5, 2.0], [0.5, 0.0, 1.0], [1.5, 1.0, 0.0]]], device=device)

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [pred.to(dtype).requires_grad_() for pred in preds]
        with use_backend(backend):
            loss = multi_horizon_loss(
                leaves, video, horizons, kind=("gaussian", "laplace", "gaussian"), beta=0.5, motion_gain=0.5,
                position_weights=weights, consistency_weights=[0, 0.5, 0.25], detach=None, residual=True,
            )  # fmt: skip
        return [loss.total, loss.per_horizon, *torch.autograd.grad(loss.total, leaves)]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(gradients("triton", dtype), gradients("reference", torch.float64), strict=True):
        assert relative_error(got.detach(), want.detach()) < tolerance
