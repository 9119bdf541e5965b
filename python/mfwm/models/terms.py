"""HeadsLoss: the loss of the horizons, with the further terms of HeadsConfig: contrast, latent_consistency,
temporal_difference and kl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import Horizons

from ..losses import latent_consistency, pairs_that_count, temporal_contrast, temporal_difference
from .balance import times_shares
from .heads_config import HeadsConfig


class HeadsLoss(NamedTuple):
    """The fields of HorizonLoss, with a total that includes the terms.

    Fields:
        terms: the mean of each term whose weight is not 0, by its name in HeadsConfig: a scalar for contrast, [K] for
            the others, 0 for horizons that have none. "contrast_accuracy" is the share of positions whose most similar
            other position is the next one.
    """

    total: Tensor
    per_horizon: Tensor
    counts: Tensor
    consistency: Tensor
    consistency_counts: Tensor
    accuracy: Tensor | None
    predictions: tuple[Tensor, ...] | None
    terms: dict[str, Tensor]


def hidden_terms(
    config: HeadsConfig,
    pools: Sequence[int],
    hidden_BTHWD: Tensor,
    states: Sequence[Tensor | None],
    segment_ids: Tensor | None,
    position_weights: Tensor | None,
    shares: Tensor | None,
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted sum of contrast and latent_consistency, and both by name.

    states: of each horizon, as Branches.branched returns them. The other arguments are those of MultiFrameHeads.
    """
    total: Tensor | float = 0.0
    terms: dict[str, Tensor] = {}
    segments = None if segment_ids is None else segment_ids[:, : hidden_BTHWD.shape[1]]
    if config.contrast:
        of_near = position_weights
        if position_weights is not None and position_weights.dim() == 3:
            of_near = position_weights[..., 0]
        loss = temporal_contrast(hidden_BTHWD.mean((2, 3)), segment_ids=segments, position_weights=of_near)
        assert loss.accuracy is not None
        total = total + config.contrast * loss.total
        terms |= {"contrast": loss.per_horizon[0], "contrast_accuracy": loss.accuracy[0]}
    if config.latent_consistency:
        far, count = list(config.far), len(config.horizons)
        of_far = position_weights
        if position_weights is not None and position_weights.dim() == 3:
            of_far = position_weights[..., far]
        weights = hidden_BTHWD.new_full((len(far),), config.latent_consistency, dtype=torch.float32)
        chosen = [states[i] for i in far]
        loss = latent_consistency(
            [unit_rms(state) for state in chosen if state is not None],
            unit_rms(hidden_BTHWD),
            Horizons(tuple(config.horizons.offsets[i] for i in far), tuple(pools[i] for i in far)),
            horizon_weights=weights if shares is None else weights * shares[count, far],
            segment_ids=segments,
            position_weights=of_far,
        )
        total = total + loss.total
        means = loss.per_horizon.new_zeros(count)
        means[far] = loss.per_horizon
        terms["latent_consistency"] = means
    return total, terms


def difference_term(
    config: HeadsConfig,
    patch_sizes: Sequence[int],
    means: Sequence[Tensor],
    video: Tensor,
    segment_ids: Tensor | None,
    position_weights: Tensor | None,
    shares: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted temporal_difference of the predicted means, and its mean by name."""
    weights = config.horizon_weights
    loss = temporal_difference(
        means,
        video,
        config.horizons,
        horizon_weights=weights if shares is None else times_shares(weights, shares[len(weights) + 1]),
        patch_sizes=patch_sizes,
        residual=config.residual,
        segment_ids=segment_ids,
        position_weights=position_weights,
    )
    return config.temporal_difference * loss.total, {"temporal_difference": loss.per_horizon}


def kl_term(
    config: HeadsConfig,
    kl_BTK: Tensor,
    counts_BTK: Tensor,
    position_weights: Tensor | None,
    shares: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted divergence of inferred latents, and its mean over what counts, by name."""
    if position_weights is not None:
        kl_BTK = kl_BTK * (position_weights if position_weights.dim() == 3 else position_weights[..., None])
    means = torch.where(counts_BTK, kl_BTK, 0).sum((0, 1)) / counts_BTK.sum((0, 1)).clamp_min(1)
    weights = torch.tensor(config.horizon_weights, device=means.device)
    total = (config.kl * (weights if shares is None else weights * shares[len(weights) + 2]) * means).sum()
    return total, {"kl": means.detach()}


def horizons_that_count(
    horizons: Horizons,
    hidden: Tensor,
    video: Tensor,
    segment_ids: Tensor | None,
    position_weights: Tensor | None,
) -> Tensor:
    """[B, T, K] bool: where each horizon has a target and a weight; arguments as in MultiFrameHeads.forward."""
    (batch, positions), frames = hidden.shape[:2], video.shape[1]
    segments = None if segment_ids is None else segment_ids[:, :frames]
    valid = [horizons.valid(i, positions, frames, segments, device=hidden.device) for i in range(len(horizons))]
    counts = torch.stack(valid, dim=-1).expand(batch, -1, -1)
    if position_weights is None:
        return counts
    return counts & ((position_weights if position_weights.dim() == 3 else position_weights[..., None]) > 0)


def unit_rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def counts_of_terms(horizons: Horizons, positions: int, frames: int, segment_ids: Tensor) -> Tensor:
    """[3, K]: in how many positions latent_consistency, temporal_difference and kl count; segment_ids [B, frames]."""
    seen = segment_ids[:, :positions]
    states = [horizons.valid(i, positions, positions, seen).sum() for i in range(len(horizons))]
    pairs = pairs_that_count(horizons, positions, frames, segment_ids).sum((0, 1))
    targets = [horizons.valid(i, positions, frames, segment_ids).sum() for i in range(len(horizons))]
    return torch.stack([torch.stack(states), pairs, torch.stack(targets)])
