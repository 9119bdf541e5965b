"""A host that predicts the features of the next frame, which a frozen encoder computes (V-JEPA 2-AC, DINO-WM).

    python examples/hosts/latent_features.py data/coinrun
    python examples/hosts/latent_features.py data/coinrun --multi-frame

`Host` is a project as we find it; `MultiFrame` is the whole change. As in these projects, tokens are in one dimension
(`grid` tells their rows and columns), the loss is L1, and the norm before the head is a LayerNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads
from small_trainer import PATCH, WIDTH, Trunk, main, patches
from torch import Tensor, nn

from mfwm_kernels import Horizons

FEATURES = 32
HORIZONS = Horizons((1, 2, 4), (1, 2, 4))


class Host(nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        # A frozen random projection stands for the encoder.
        self.register_buffer("encoder", torch.randn(PATCH * PATCH * 3, FEATURES) / PATCH)
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.trunk = Trunk(actions)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FEATURES))

    def features(self, video: Tensor) -> Tensor:
        """[B, T, S, FEATURES]."""
        return F.layer_norm(patches(video) @ self.encoder, (FEATURES,)).flatten(2, 3)

    def hidden(self, features: Tensor, video: Tensor, actions: Tensor) -> Tensor:
        grid = (video.shape[3] // PATCH, video.shape[4] // PATCH)
        return self.trunk(self.embed(features).unflatten(2, grid), actions).flatten(2, 3)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(video)
        loss = F.l1_loss(self.head(self.hidden(features, video, actions))[:, :-1], features[:, 1:])
        return loss, loss.detach()[None]


class MultiFrame(Host):
    """Predicts n + 1 by the host's own head, and n + 2 and n + 4 at 1/2 and 1/4 of its size."""

    def __init__(self, actions: int, horizons: Horizons = HORIZONS, side: int = 64) -> None:
        super().__init__(actions)
        config = HeadsConfig(
            horizons, output="latents", kind="l1", norm="layer", residual=False,
            patch_sizes=(1,) * len(horizons), weights=(1.0, 0.5, 0.2)[: len(horizons)],
        )  # fmt: skip
        grid = (side // PATCH, side // PATCH)
        self.heads = MultiFrameHeads(WIDTH, 1, config, channels=FEATURES, near_head=self.head, grid=grid)
        self.to_come = nn.Embedding(actions, WIDTH)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(video)
        loss = self.heads(self.hidden(features, video, actions), self.to_come(actions), features)
        return loss.total, loss.per_horizon


if __name__ == "__main__":
    main(__doc__, Host, MultiFrame)
