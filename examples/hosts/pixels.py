"""A host that predicts the change of the next frame's pixels from a hidden state, as many small world models do.

    python examples/hosts/pixels.py data/coinrun
    python examples/hosts/pixels.py data/coinrun --multi-frame

`Host` is a project as we find it; `MultiFrame` is the whole change.
"""

from __future__ import annotations

import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads
from small_trainer import PATCH, WIDTH, Trunk, main, patches
from torch import Tensor, nn

from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4, 8), (1, 2, 4, 4))


class Host(nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH * 3, WIDTH)
        self.trunk = Trunk(actions)
        self.head = nn.Linear(WIDTH, PATCH * PATCH * 3)

    def hidden(self, video: Tensor, actions: Tensor) -> Tensor:
        return self.trunk(self.embed(patches(video)), actions)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        change = self.head(self.hidden(video, actions))[:, :-1]
        loss = F.mse_loss(patches(video)[:, :-1] + change, patches(video)[:, 1:])
        return loss, loss.detach()[None]


class MultiFrame(Host):
    """Predicts n + 1 by the host's own head, and n + 2, n + 4 and n + 8 at 1/2, 1/4 and 1/4 of its size."""

    def __init__(self, actions: int, horizons: Horizons = HORIZONS) -> None:
        super().__init__(actions)
        config = HeadsConfig(horizons, weights=(1.0, 0.5, 0.2, 0.1)[: len(horizons)])
        self.heads = MultiFrameHeads(WIDTH, PATCH, config, near_head=self.head)
        self.to_come = nn.Embedding(actions, WIDTH)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.heads(self.hidden(video, actions), self.to_come(actions), video)
        return loss.total, loss.per_horizon


if __name__ == "__main__":
    main(__doc__, Host, MultiFrame)
