"""A host that predicts the ids of the next frame's tokens: its position n has seen frame n and action n.

    python examples/hosts/shifted_tokens.py data/coinrun
    python examples/hosts/shifted_tokens.py data/coinrun --multi-frame

`Host` is a project as we find it; `MultiFrame` is the whole change. The far targets are the mixes of ids in 2 x 2 and
4 x 4 tokens, and no logits of any horizon are stored.
"""

from __future__ import annotations

import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads
from small_trainer import VOCABULARY, WIDTH, Trunk, ids_of, main
from torch import Tensor, nn

from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4, 8), (1, 2, 4, 4))


class Host(nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = Trunk(actions)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids_of(video)
        logits = self.head(self.trunk(self.embed(ids), actions))[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 3), ids[:, 1:].flatten())
        return loss, loss.detach()[None]


class MultiFrame(Host):
    """Predicts n + 1 by the host's own head, and n + 2, n + 4 and n + 8 on grids of 1/2, 1/4 and 1/4 of its size."""

    def __init__(self, actions: int, horizons: Horizons = HORIZONS) -> None:
        super().__init__(actions)
        config = HeadsConfig(
            horizons, output="tokens", vocabulary=VOCABULARY, bias=True, weights=(1.0, 0.5, 0.2, 0.1)[: len(horizons)]
        )
        self.heads = MultiFrameHeads(WIDTH, 1, config, near_head=self.head)
        self.to_come = nn.Embedding(actions, WIDTH)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids_of(video)
        loss = self.heads(self.trunk(self.embed(ids), actions), self.to_come(actions), ids)
        return loss.total, loss.per_horizon


if __name__ == "__main__":
    main(__doc__, Host, MultiFrame)
