"""A host that predicts the masked tokens of frame n itself, from the past and the tokens of n that it sees (MaskGIT).

    python examples/hosts/maskgit_tokens.py data/coinrun
    python examples/hosts/maskgit_tokens.py data/coinrun --multi-frame

`Host` is a project as we find it; `MultiFrame` is the whole change. The near horizon has offset 0. Action n - 1 leads
to frame n, so position n has seen actions up to n - 1, and the window of a far horizon starts at action n: window_start
is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads
from small_trainer import VOCABULARY, WIDTH, Trunk, ids_of, main
from torch import Tensor, nn

from mfwm_kernels import Horizons

HORIZONS = Horizons((0, 1, 3, 7), (1, 2, 4, 4))


class Host(nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY + 1, WIDTH)  # the last id marks a masked token
        self.trunk = Trunk(actions + 1)  # the last action stands for the one before the clip, which is unknown
        self.unknown = actions
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, ids: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        seen = torch.where(mask, VOCABULARY, ids)
        return self.trunk(self.embed(seen), F.pad(actions[:, :-1], (1, 0), value=self.unknown))

    def mask(self, ids: Tensor) -> Tensor:
        """Which tokens are masked: a random share of each frame, at least half of it."""
        return torch.rand(ids.shape) < 0.5 + torch.rand(ids.shape[:2])[..., None, None] / 2

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids_of(video)
        mask = self.mask(ids)
        logits = self.head(self.hidden(ids, mask, actions))
        loss = F.cross_entropy(logits[mask], ids[mask])
        return loss, loss.detach()[None]


class MultiFrame(Host):
    """Predicts the masked tokens of n by the host's own head, and n + 1, n + 3 and n + 7 on smaller grids."""

    def __init__(self, actions: int, horizons: Horizons = HORIZONS) -> None:
        super().__init__(actions)
        config = HeadsConfig(
            horizons, output="tokens", vocabulary=VOCABULARY, bias=True, weights=(1.0, 0.5, 0.2, 0.1)[: len(horizons)]
        )
        self.heads = MultiFrameHeads(WIDTH, 1, config, near_head=self.head, window_start=0)
        self.to_come = nn.Embedding(actions, WIDTH)

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids_of(video)
        mask = self.mask(ids)
        loss = self.heads(self.hidden(ids, mask, actions), self.to_come(actions), ids, token_mask=mask)
        return loss.total, loss.per_horizon


if __name__ == "__main__":
    main(__doc__, Host, MultiFrame)
