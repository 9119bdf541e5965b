"""A host that denoises the next frame given a hidden state of the past (DIAMOND), and keeps that loss.

    python examples/hosts/diffusion.py data/coinrun
    python examples/hosts/diffusion.py data/coinrun --multi-frame

`Host` is a project as we find it; `MultiFrame` is the whole change: the far horizons, which are pooled and so have no
texture to denoise, are regressed from the same hidden state, and train it beside the host's own loss.
"""

from __future__ import annotations

import torch
from mfwm import HeadsConfig, MultiFrameHeads
from small_trainer import PATCH, WIDTH, Trunk, main, patches
from torch import Tensor, nn

from mfwm_kernels import Horizons

DATA_DEVIATION = 0.5  # EDM's sigma_data


class Host(nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH * 3, WIDTH)
        self.trunk = Trunk(actions)
        self.denoiser = nn.Sequential(
            nn.Linear(WIDTH + PATCH * PATCH * 3 + 1, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, PATCH * PATCH * 3)
        )

    def hidden(self, video: Tensor, actions: Tensor) -> Tensor:
        return self.trunk(self.embed(patches(video)), actions)

    def denoising_loss(self, hidden: Tensor, video: Tensor) -> Tensor:
        """EDM's loss of frame n + 1, noised at a random strength for each frame, given the hidden state of n."""
        clean, hidden = patches(video)[:, 1:], hidden[:, :-1]
        strength = (1.2 * torch.randn(clean.shape[:2]) - 1.2).exp()[..., None, None, None]
        noisy = clean + strength * torch.randn_like(clean)
        variance = strength**2 + DATA_DEVIATION**2
        inputs = [hidden, noisy / variance.sqrt(), (strength.log() / 4).expand(*hidden.shape[:-1], 1)]
        output = self.denoiser(torch.cat(inputs, -1))
        target = (clean - DATA_DEVIATION**2 / variance * noisy) * variance.sqrt() / (strength * DATA_DEVIATION)
        return (output - target).square().mean()

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.denoising_loss(self.hidden(video, actions), video)
        return loss, loss.detach()[None]


class MultiFrame(Host):
    """Denoises n + 1 as before, and predicts n + 2, n + 4 and n + 8 at 1/2, 1/4 and 1/4 of its size."""

    def __init__(self, actions: int, weights: tuple[float, ...] = (0.5, 0.2, 0.1)) -> None:
        super().__init__(actions)
        config = HeadsConfig(Horizons((2, 4, 8), (2, 4, 4)), weights=weights)
        self.heads = MultiFrameHeads(WIDTH, PATCH, config)
        self.to_come = nn.Embedding(actions, WIDTH)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(video, actions)
        near, far = self.denoising_loss(hidden, video), self.heads(hidden, self.to_come(actions), video)
        return near + far.total, torch.cat([near.detach()[None], far.per_horizon])


if __name__ == "__main__":
    main(__doc__, Host, MultiFrame)
