"""The calls of multi_horizon_loss that its record lists: for tests, compilation and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..horizons import Horizons
from .loss_kinds import KIND_OF_MEANS, KINDS
from .video_pyramid import output_shape


def _bench(
    batch: int, time: int, channels: int, size: int, factors: tuple[int, ...], patch: int | None, latents: bool = False
) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        shape = (batch, time, channels, size, size)
        video = torch.randn(shape, device=device).to(dtype) if latents else torch.randint(
            0, 256, shape, device=device, dtype=torch.uint8
        )  # fmt: skip
        horizons = Horizons((1, 2, 4, 8), factors)
        preds = [torch.randn(output_shape(video, f, patch), device=device).to(dtype) for f in factors]
        weights = [0.0, 0.1, 0.1, 0.1]
        kwargs = {"preds": preds, "video": video, "horizons": horizons, "consistency_weights": weights, "detach": None}
        return kwargs if patch is None else {**kwargs, "patch_sizes": (patch,) * len(factors)}

    return make


def _bench_features(batch: int, time: int, channels: int, side: int) -> Any:
    """Of V-JEPA 2's kind: channels innermost, and L1."""

    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        horizons = Horizons((1, 2, 4), (1, 2, 4))
        return {
            "preds": [
                torch.randn(batch, time - 1, side * side // f**2, channels, device=device).to(dtype)
                for f in horizons.factors
            ],
            "video": torch.randn(batch, time, side * side, channels, device=device).to(dtype),
            "horizons": horizons,
            "kind": "l1",
            "grid": (side, side),
        }

    return make


BENCH = {
    "cpu": _bench(8, 24, 3, 128, (1, 2, 4, 8), None),
    "cpu-features": _bench_features(4, 8, 1024, 16),
    "genie": _bench(36, 16, 3, 64, (1, 2, 4, 4), 4),
    "pixels": _bench(32, 24, 3, 256, (1, 2, 4, 8), 8),
    "latents": _bench(16, 32, 16, 32, (1, 2, 2, 2), 2, latents=True),
}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def bytes_(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)

    def inputs(
        video: Tensor,
        horizons: Horizons,
        positions: int,
        patch_sizes: tuple[int, ...] | None = None,
        kinds: tuple[str, ...] | None = None,
    ) -> Any:
        preds = []
        for i, factor in enumerate(horizons.factors):
            shape = list(output_shape(video, factor, None if patch_sizes is None else patch_sizes[i]))
            shape[1] = positions
            if kinds is not None and kinds[i] in KIND_OF_MEANS:
                shape[2 if patch_sizes is None else 3] *= 2
            preds.append(normal(*shape))
        tokens = {} if patch_sizes is None else {"patch_sizes": patch_sizes}
        return {"preds": preds, "video": video, "horizons": horizons, **tokens, **({"kind": kinds} if kinds else {})}

    cascade = Horizons.cascade(4)
    segments = torch.tensor([[0] * 4 + [1] * 8, [5] * 12], device=device)
    yield inputs(bytes_(2, 12, 3, 16, 24), cascade, 12)
    yield {
        **inputs(bytes_(2, 12, 8, 16, 3).permute(0, 1, 4, 2, 3), cascade, 10),
        "horizon_weights": torch.tensor([1.0, 0.5, 0.25, 0.125], device=device), "segment_ids": segments,
        "consistency_weights": torch.tensor([0.0, 0.3, 0.2, 0.1], device=device), "residual": True, "detach": None,
    }  # fmt: skip
    yield {
        **inputs(normal(2, 12, 1, 18, 12), Horizons((0, 1, 3), (1, 3, 3)), 12, (2, 1, 2)),
        "kind": "huber", "delta": 0.7, "consistency_weights": [[0, 0.5, 0.25], [0, 0, 1.5], [0, 0, 0]],
        "detach": "near", "segment_ids": segments.int(),
    }  # fmt: skip
    yield {
        **inputs(bytes_(2, 12, 3, 16, 8), cascade, 12, (4, 4, 2, 1)), "kind": "charbonnier", "eps": 0.1,
        "consistency_weights": [0, 1, 0, 0.5], "detach": "far", "horizon_weights": [1, 2, 0, 0.5], "residual": True,
    }  # fmt: skip
    multi = inputs(normal(1, 6, 16, 8, 8), Horizons.multi_resolution(), 5)
    yield {**multi, "preds": [torch.stack([p, p], -1)[..., 0] for p in multi["preds"]], "kind": "l1",
           "consistency_weights": [0, 1, 1, 0.5, 0.25], "detach": None}  # fmt: skip
    # Dense with channels innermost, because gradients then have the same strides.
    thwc = inputs(bytes_(2, 3, 8, 8, 3).permute(0, 1, 4, 2, 3), Horizons((1, 2), (1, 2)), 3)
    yield {**thwc, "preds": [p.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for p in thwc["preds"]],
           "consistency_weights": torch.tensor([[0.0, 0.5], [0.0, 0.0]], device=device).T.contiguous().T,
           "detach": None}  # fmt: skip
    yield {
        "preds": [normal(1, 5, 24, 10), normal(1, 5, 6, 10)], "video": normal(1, 6, 24, 5),
        "horizons": Horizons((1, 2), (1, 2)),
        "kind": "laplace", "grid": (4, 6), "segment_ids": segments[:1, 2:8], "consistency_weights": [0, 0.5],
        "motion_gain": 2.0,
    }  # fmt: skip
    mixed = inputs(bytes_(2, 6, 3, 8, 12), Horizons((1, 2, 4), (1, 2, 2)), 5, kinds=("laplace", "huber", "gaussian"))
    weights = torch.arange(30, device=device).remainder(4).div(2).view(2, 5, 3)
    yield {
        **mixed, "residual": True, "motion_gain": 0.7, "position_weights": weights, "beta": 0.25, "detach": None,
        "horizon_weights": torch.tensor([1.0, 0.5, 0.25], device=device),
        "consistency_weights": torch.tensor([[0, 0.5, 0.25], [0, 0, 1.5], [0, 0, 0]], device=device),
    }  # fmt: skip
    gaussians = inputs(normal(1, 5, 2, 8, 4), Horizons((0, 1, 2), (1, 2, 2)), 4, (2, 1, 2), ("gaussian",) * 3)
    yield {**gaussians, "beta": 0.5, "consistency_weights": [0, 1, 0.5], "detach": "far",
           "position_weights": weights[0, :4, :1].T.double()}  # fmt: skip
    # Shorter than the longest offset, so the last horizon counts nowhere.
    yield {**inputs(bytes_(1, 5, 3, 8, 8), cascade, 5), "consistency_weights": [0.0, 1.0, 1.0, 1.0]}
    yield inputs(bytes_(0, 4, 3, 8, 8), cascade, 4)
    yield inputs(bytes_(2, 3, 3, 8, 8), cascade, 0)


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def with_all(size: str, kind: str | Sequence[str]) -> dict[str, Any]:
        kwargs = BENCH[size](dtype, device)
        segment_ids = torch.empty(kwargs["video"].shape[:2], dtype=torch.int64, device=device)
        return {**kwargs, "kind": kind, "residual": True, "segment_ids": segment_ids}

    for kind in KINDS[:4]:
        yield with_all("genie", kind)
    yield with_all("latents", "l1")
    tokens = with_all("pixels", "huber")
    yield tokens
    shapes = [output_shape(tokens["video"], factor, None) for factor in tokens["horizons"].factors]
    images = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    yield {**tokens, "preds": images, "patch_sizes": None}

    def with_distributions(size: str, *kinds: str) -> dict[str, Any]:
        kwargs = {**with_all(size, kinds), "motion_gain": 0.5, "beta": 0.5}
        batch, time = kwargs["video"].shape[:2]
        preds = [
            torch.cat([pred, pred], 2 if pred.dim() == 5 else 3) if kind in KIND_OF_MEANS else pred
            for kind, pred in zip(kinds, kwargs["preds"], strict=True)
        ]
        return {**kwargs, "preds": preds, "position_weights": torch.ones(batch, time, len(kinds), device=device)}

    yield with_distributions("genie", "gaussian", "laplace", "gaussian", "laplace")
    yield with_distributions("genie", "l1", "mse", "laplace", "gaussian")
    yield with_distributions("latents", "huber", "charbonnier", "gaussian", "laplace")
