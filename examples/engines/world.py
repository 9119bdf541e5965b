"""What the engines train: a small world model with four horizons, on clips that are drawn here.

A square moves as the actions say. Clip number i is the same in every process, and the clips of a step are its numbers
step * BATCH to step * BATCH + BATCH - 1, so that any number of processes can share one global batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads
from torch import Tensor, nn
from torch.utils.data import Dataset

from mfwm_kernels import Horizons

BATCH, FRAMES, SIDE, PATCH, WIDTH, ACTIONS = 8, 16, 16, 4, 64, 4
HORIZONS = Horizons((1, 2, 4, 8), (1, 2, 4, 4))


class Clips(Dataset[tuple[Tensor, Tensor]]):
    """uint8 frames [T, C, H, W] of a moving square, and the actions [T] that lead from each frame to the next."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * BATCH

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        actions = torch.randint(0, ACTIONS, (FRAMES // 4,), generator=generator).repeat_interleave(4)
        moves = torch.tensor([(0, 1), (0, -1), (1, 0), (-1, 0)])[actions]
        places = torch.randint(0, SIDE, (2,), generator=generator) + moves.cumsum(0) - moves
        grid = torch.arange(SIDE)
        inside = [((grid - place[:, None]) % SIDE < 4) for place in places.T]
        frames = torch.where(inside[0][:, :, None] & inside[1][:, None, :], 220, 30).to(torch.uint8)
        return frames[:, None].repeat(1, 3, 1, 1), actions


class Block(nn.Module):
    """Mixes frames by a GRU, which sees the past only, and features by an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.time = nn.GRU(WIDTH, WIDTH, batch_first=True)
        widened = (nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), *widened)

    def forward(self, x: Tensor) -> Tensor:
        B, T, H, W, D = x.shape
        series = self.norm(x).permute(0, 2, 3, 1, 4).reshape(-1, T, D)
        x = x + self.time(series)[0].reshape(B, H, W, T, D).permute(0, 3, 1, 2, 4)
        return x + self.mlp(x)


class World(nn.Module):
    """A trunk of your own, and MultiFrameHeads on its last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH * 3, WIDTH)
        self.action = nn.Embedding(ACTIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.heads = MultiFrameHeads(WIDTH, PATCH, HeadsConfig(HORIZONS, weights=(1.0, 0.5, 0.2, 0.1)))

    def forward(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and that of each horizon [K]."""
        patches = F.pixel_unshuffle(video / 127.5 - 1, PATCH).permute(0, 1, 3, 4, 2)
        known = self.action(actions)  # The action of n, which leads to frame n + 1.
        hidden = self.embed(patches) + known[:, :, None, None]
        for block in self.blocks:
            hidden = block(hidden)
        loss = self.heads(hidden, known, video)
        return loss.total, loss.per_horizon
