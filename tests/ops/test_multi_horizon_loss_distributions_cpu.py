"""Tests of multi_horizon_loss on the CPU alone: tiles of distributions, of motion and of features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_multi_horizon_loss_cpu import (
    ALL_PAIRS,
    CASCADE,
    TOLERANCE,
    check,
    check_needed_gradients,
    check_threads,
    inputs,
)
from torch import Tensor

from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
from mfwm_kernels.backends import ABSENT

pytestmark = pytest.mark.skipif(bool(ABSENT["cpu"]), reason="no compiled module")

MIXED = ("gaussian", "huber", "laplace")
ALL = {"consistency_weights": ALL_PAIRS, "motion_gain": 0.7, "beta": 0.5, "residual": True}


def with_log_scales(preds: list[Tensor], kinds: tuple[str, ...], axis: int) -> list[Tensor]:
    """The predictions with log-scales where the kind is a distribution."""
    distributions = ("gaussian", "laplace")
    return [
        torch.cat([pred, torch.randn_like(pred)], axis) if kind in distributions else pred
        for pred, kind in zip(preds, kinds, strict=True)
    ]


def weights(batch: int, time: int, horizons: int) -> Tensor:
    return torch.rand(batch, time, horizons) * (torch.rand(batch, time, horizons) > 0.25)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kinds", [("gaussian",) * 3, ("laplace",) * 3, MIXED, ("mse", "l1", "charbonnier")])
@pytest.mark.parametrize("size", [(8, 4), (12, 36), (20, 132), (8, 2076)])
def test_widths_that_no_number_of_lanes_fills(
    size: tuple[int, int], kinds: tuple[str, ...], dtype: torch.dtype
) -> None:
    preds, video = inputs(2, 6, 1, *size, CASCADE, dtype)
    preds = with_log_scales(preds, kinds, 2)
    check(preds, video, CASCADE, kind=kinds, consistency_weights=[0, 0.5, 0.25])
    check(preds, video, CASCADE, kind=kinds, **ALL, position_weights=weights(2, 6, 3))


@pytest.mark.parametrize("detach", [None, "near", "far"])
@pytest.mark.parametrize("horizons", [Horizons((1, 2, 4), (1, 4, 4)), Horizons((0, 1, 1), (1, 3, 6)), CASCADE])
def test_pairs(horizons: Horizons, detach: str | None) -> None:
    for kinds in (MIXED, ("mse", "gaussian", "l1"), ("l1", "laplace", "charbonnier")):
        preds, video = inputs(2, 6, 3, 24, 36, horizons, torch.float32)
        options = {"consistency_weights": ALL_PAIRS, "detach": detach, "position_weights": weights(2, 6, 3)}
        check(with_log_scales(preds, kinds, 2), video, horizons, kind=kinds, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strides(dtype: torch.dtype) -> None:
    preds, video = inputs(1, 6, 3, 16, 36, CASCADE, dtype)
    preds = with_log_scales(preds, MIXED, 2)
    options: dict[str, Any] = {**ALL, "kind": MIXED, "position_weights": weights(1, 6, 3)}
    channels_last = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    check(preds, channels_last, CASCADE, **options)
    for axes in ((-1, -2), (2, -1)):
        check([pred.transpose(*axes).contiguous().transpose(*axes) for pred in preds], video, CASCADE, **options)
    check([torch.nn.functional.pad(pred, (3, 2))[..., 3:-2] for pred in preds], video, CASCADE, **options)
    check([pred[:, :1].expand_as(pred) for pred in preds], video, CASCADE, **options)
    for given in (torch.rand(1, 3, 6).permute(0, 2, 1), torch.rand(1, 6), torch.rand(1, 1, 1).expand(1, 6, 3).double()):
        check(preds, video, CASCADE, **{**options, "position_weights": given})
        check(inputs(1, 6, 3, 16, 36, CASCADE, dtype)[0], video, CASCADE, position_weights=given)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("patches", [(12, 8, 3), (4, 4, 4), (2, 1, 6)])
@pytest.mark.parametrize("channels", [3, 4])
def test_tokens_of_pixels(channels: int, patches: tuple[int, ...], dtype: torch.dtype) -> None:
    video = torch.randint(0, 256, (1, 6, channels, 48, 96), dtype=torch.uint8)
    sides = zip(CASCADE.factors, patches, strict=True)
    sizes = [(48 // f // p * (96 // f // p), p * p * channels) for f, p in sides]
    preds = with_log_scales([torch.randn(1, 6, *size).to(dtype) for size in sizes], MIXED, 3)
    options: dict[str, Any] = {**ALL, "patch_sizes": patches, "kind": MIXED, "position_weights": weights(1, 6, 3)}
    check(preds, video, CASCADE, **options)
    check([pred.transpose(-1, -2).contiguous().transpose(-1, -2) for pred in preds], video, CASCADE, **options)


@pytest.mark.parametrize("layout", ["image", "tokens", "grid"])
def test_gradcheck(layout: str) -> None:
    horizons = Horizons((1, 2, 2), (1, 1, 2))
    preds = [torch.randn(1, 3, 2, 4 // f, 4 // f, dtype=torch.float64) for f in horizons.factors]
    video = torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    options: dict[str, Any] = {"kind": MIXED, "position_weights": weights(1, 3, 3), "residual": True, "detach": None}
    if layout == "image":
        preds = with_log_scales(preds, MIXED, 2)
    else:
        preds = with_log_scales([pred.flatten(3).transpose(2, 3) for pred in preds], MIXED, 3)
        options |= {"patch_sizes": (1, 1, 1)} if layout == "tokens" else {"grid": (4, 4)}
    if layout == "grid":
        video = video.flatten(3).transpose(2, 3).contiguous()
    leaves = [pred.requires_grad_() for pred in preds]
    horizon_weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    consistency = torch.tensor(ALL_PAIRS, dtype=torch.float64, requires_grad=True)

    def total(*tensors: Tensor) -> Tensor:
        weighted = {"horizon_weights": tensors[3], "consistency_weights": tensors[4]}
        return multi_horizon_loss(tensors[:3], video, horizons, motion_gain=0.5, **options, **weighted).total

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(total, [*leaves, horizon_weights, consistency])


def test_only_the_needed_gradients_and_any_number_of_threads() -> None:
    preds, video = inputs(2, 6, 3, 64, 72, CASCADE, torch.bfloat16)
    preds = with_log_scales(preds, MIXED, 2)
    options: dict[str, Any] = {**ALL, "kind": MIXED, "detach": None, "position_weights": weights(2, 6, 3)}
    check_needed_gradients(preds, video, CASCADE, **options)
    check_threads(preds, video, CASCADE, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_larger_than_the_caches(dtype: torch.dtype) -> None:
    horizons = Horizons.cascade(3)
    preds, video = inputs(1, 34, 3, 264, 264, horizons, dtype)
    preds = with_log_scales(preds, ("mse", "gaussian", "laplace"), 2)
    assert sum(pred.numel() * pred.element_size() for pred in preds) > 16 << 20
    scale = 65536.0  # without it, gradients would be subnormal in fp16
    consistency_weights = [0, 0.1 * scale, 0.1 * scale]
    kinds = ("mse", "gaussian", "laplace")
    check(preds, video, horizons, kind=kinds, consistency_weights=consistency_weights, horizon_weights=[scale] * 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [16, 40, 394])
@pytest.mark.parametrize(
    "horizons",
    [
        Horizons.next_frame(),
        CASCADE,
        Horizons((1, 2, 4), (1, 2, 3)),  # tiles of fewer channels than a pixel has
        Horizons((1, 2, 4), (2, 2, 12)),  # no horizon at the video's size, and one of a single pixel
    ],
)
def test_features(horizons: Horizons, channels: int, dtype: torch.dtype) -> None:
    """Channels innermost: tokens [B, T, S, C] with a grid, of several sizes and strides."""
    grid = (12, 12)
    video = torch.randn(2, 6, 144, channels).to(dtype)
    preds = [torch.randn(2, 5, 144 // f**2, channels).to(dtype) for f in horizons.factors]
    count = len(preds)
    pairs = torch.ones(count, count).triu(1) * torch.tensor(
        [[f % e == 0 for f in horizons.factors] for e in horizons.factors]
    )
    options: dict[str, Any] = {"grid": grid, "consistency_weights": pairs, "position_weights": weights(2, 5, count)}
    for kind in ("mse", "l1"):
        check(preds, video, horizons, kind=kind, **options)
    check(preds, video, horizons, kind="huber", residual=True, motion_gain=0.5, **options)
    check(preds, video, horizons, kind="l1", scale=0.5, shift=0.25, **{**options, "position_weights": None})
    padded = [torch.nn.functional.pad(pred, (3, 2, 1, 0))[..., 1:, 3:-2] for pred in preds]
    check(padded, torch.nn.functional.pad(video, (3, 2))[..., 3:-2], horizons, **options)
    check([pred[:, :1].expand_as(pred) for pred in preds], video.float(), horizons, **options)
    check(preds, video.transpose(2, 3).contiguous().transpose(2, 3), horizons, **options)
    kinds = MIXED[:count]
    distributions = with_log_scales(preds, kinds, 3)
    check(distributions, video, horizons, kind=kinds, residual=True, motion_gain=0.5, beta=0.5, **options)
    check(distributions, (video * 30).byte(), horizons, kind=kinds, **options)


def test_features_on_any_number_of_threads() -> None:
    horizons, grid = Horizons((1, 2, 4), (1, 2, 3)), (12, 12)
    video, preds = torch.randn(1, 6, 144, 100), [torch.randn(1, 5, 144 // f**2, 100) for f in horizons.factors]
    check_threads(preds, video, horizons, grid=grid, consistency_weights=[0, 0.5, 0.25])
