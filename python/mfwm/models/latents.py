"""FrameLatents: random variables for what of far frames cannot be known, as in SVG with a learned prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfwm_kernels import Horizons, video_pyramid

from .distributions import LOG_SCALE_LIMIT

# Side of the picture of a target frame that the posterior reads.
THUMBNAIL = 8


class FrameLatents(nn.Module):
    """A Gaussian z for each far horizon, added to the input of its branch (SVG-LP, arXiv 1802.07687).

        prior     p(z_i) = N(linear(mean over tokens of hidden))
        posterior q(z_i) = N(mlp([that mean, frame n + k_i in 8 x 8 pixels]))

    Training draws from the posterior and pays the KL divergence to the prior; a prediction draws from the prior.

    Args:
        width: D. size: of z. far: the horizons that have one, of `horizons`. channels: of frames.
    """

    def __init__(self, width: int, size: int, horizons: Horizons, far: Sequence[int], channels: int):
        super().__init__()
        self.size, self.horizons, self.far = size, horizons, tuple(far)
        self.prior = nn.Linear(width, 2 * size * len(far))
        features = width + channels * THUMBNAIL**2
        self.posteriors = nn.ModuleList(
            nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, 2 * size)) for _ in far
        )
        self.embed = nn.ModuleList(nn.Linear(size, width, bias=False) for _ in far)

    def extra_repr(self) -> str:
        return f"size={self.size}, far={self.far}"

    def drawn(self, hidden_BTHWD: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """[B, T, K, D]: what to add for z drawn from the prior; at temperature 0 its mean."""
        mean, log_variance = self._prior(hidden_BTHWD.mean((2, 3)))
        if temperature:
            noise = torch.empty_like(mean).normal_(generator=generator)
            mean = mean + temperature * torch.exp(0.5 * log_variance) * noise
        return self._embedded(mean)

    def inferred(
        self, hidden_BTHWD: Tensor, video: Tensor, valid_BTK: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, T, K, D] for z drawn from the posterior with noise [B, T, far, size] (None: its mean), and the KL
        divergence [B, T, K] in nats.

        Where a horizon does not count, z comes from the prior and the divergence is 0.
        """
        positions, state = hidden_BTHWD.shape[1], hidden_BTHWD.mean((2, 3))
        prior = self._prior(state)
        parts, last = [], video.shape[1] - 1
        pyramid = video_pyramid(video, tuple(self.horizons.factors[i] for i in self.far), dtype=torch.float32)
        for i, frames, posterior in zip(self.far, pyramid, self.posteriors, strict=True):
            index = (torch.arange(positions, device=video.device) + self.horizons.offsets[i]).clamp_max(last)
            small = F.adaptive_avg_pool2d(frames[:, index].flatten(0, 1), THUMBNAIL)
            thumbnails = small.flatten(1).unflatten(0, state.shape[:2])
            thumbnails = torch.where(valid_BTK[..., i, None], thumbnails, 0).to(state.dtype)
            parts.append(posterior(torch.cat([state, thumbnails], dim=-1)).float())
        counts = valid_BTK[..., list(self.far), None]
        mean, log_variance = (
            torch.where(counts, q, p) for q, p in zip(split(torch.stack(parts, dim=2)), prior, strict=True)
        )
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        divergence = kl_divergence(mean, log_variance, *prior).sum(-1)
        kl = divergence.new_zeros(*divergence.shape[:2], len(self.horizons))
        kl[..., list(self.far)] = divergence
        return self._embedded(z), kl

    def _prior(self, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return split(self.prior(state_BTD).float().unflatten(-1, (len(self.far), 2 * self.size)))

    def _embedded(self, z: Tensor) -> Tensor:
        """[B, T, K, D], zero for horizons that have no z."""
        z = z.to(self.prior.weight.dtype)
        added = {i: embed(z[:, :, n]) for n, (i, embed) in enumerate(zip(self.far, self.embed, strict=True))}
        nothing = torch.zeros_like(next(iter(added.values())))
        return torch.stack([added.get(i, nothing) for i in range(len(self.horizons))], dim=2)


def split(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance."""
    mean, log_variance = parameters.chunk(2, dim=-1)
    return mean, log_variance.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)


def kl_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))) of every element."""
    ratio = torch.exp(log_variance - other_log_variance)
    apart = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + apart - 1)
