"""What the example hosts share: a trunk, ids of frames, and a training loop in plain PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Protocol

import torch
from mfwm.data import ClipSampler, Replay
from torch import Tensor, nn

PATCH, WIDTH = 4, 64
LEVELS = 4  # of each colour in an id
VOCABULARY = LEVELS**3


class Trunk(nn.Module):
    """Mixes the tokens of a frame by a convolution, and runs a GRU over time at each of them."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.action = nn.Embedding(actions, WIDTH)
        self.mix = nn.Sequential(nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU())
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """[B, T, H, W, D] -> the same: position n has seen the tokens and `actions` [B, T] up to n."""
        images = tokens.flatten(0, 1).permute(0, 3, 1, 2)
        x = self.mix(images).unflatten(0, tokens.shape[:2]).permute(0, 3, 4, 1, 2)
        x = x + self.action(actions)[:, None, None]
        out, _ = self.gru(x.flatten(0, 2))
        return (x + out.unflatten(0, x.shape[:3])).permute(0, 3, 1, 2, 4)


class Host(Protocol):
    """A world model: `loss` returns what to minimise, and the numbers to print."""

    def loss(self, video: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]: ...


def patches(video: Tensor) -> Tensor:
    """[B, T, 3, height, width] -> [B, T, H, W, PATCH * PATCH * 3], features in (row, column, channel) order."""
    cells = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return cells.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)


def ids_of(video: Tensor) -> Tensor:
    """[B, T, H, W]: the mean colour of each patch, in LEVELS levels per channel. It stands for a tokenizer."""
    colours = patches(video).unflatten(-1, (-1, 3)).mean(-2)
    levels = ((colours + 1) / 2 * LEVELS).long().clamp(0, LEVELS - 1)
    return (levels * torch.tensor([LEVELS**2, LEVELS, 1])).sum(-1)


def main(description: str | None, host: Callable[[int], nn.Module], multi_frame: Callable[[int], nn.Module]) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a replay buffer, such as one that `mfwm collect` has recorded")
    parser.add_argument("--multi-frame", action="store_true", help="predict several frames instead of one")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    replay = Replay(arguments.data)
    model = (multi_frame if arguments.multi_frame else host)(replay.actions or 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, clips in enumerate(ClipSampler(replay, 16, 8).batches(0, arguments.steps)):
        total, shown = model.loss(clips["video"] / 127.5 - 1, clips["actions"])
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        if step % 20 == 0 or step + 1 == arguments.steps:
            print(f"step {step}: losses {[round(number, 4) for number in shown.tolist()]}", flush=True)
