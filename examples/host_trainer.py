"""A next-frame world model in plain PyTorch, as in many projects: a network, a loss, a training loop.

    mfwm collect doom --frames 6000 --out data/doom
    python examples/host_trainer.py data/doom

host_trainer_multi_frame.py is this file with heads for four frames ahead; `diff` shows the whole change.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from mfwm.data import ClipSampler, Replay
from torch import Tensor, nn

PATCH, WIDTH = 8, 96


class Dynamics(nn.Module):
    """Embeds the patches of a frame, mixes them by a convolution, and runs a GRU over time at each patch."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.action = nn.Embedding(actions, WIDTH)
        self.mix = nn.Sequential(nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU())
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, PATCH * PATCH * 3)

    def hidden(self, video: Tensor, actions: Tensor) -> Tensor:
        """[B, T, H, W, D] for frames [B, T, 3, height, width]: position n has seen frames and actions up to n."""
        B, T = video.shape[:2]
        x = self.mix(self.embed(video.flatten(0, 1))).unflatten(0, (B, T)).permute(0, 3, 4, 1, 2)
        x = x + self.action(actions)[:, None, None]
        grid = x.shape[:3]
        out, _ = self.gru(x.flatten(0, 2))
        return (x + out.unflatten(0, grid)).permute(0, 3, 1, 2, 4)

    def loss(self, video: Tensor, actions: Tensor) -> Tensor:
        change = self.head(self.hidden(video[:, :-1], actions[:, :-1]))
        rows = change.unflatten(-1, (PATCH, PATCH, 3)).permute(0, 1, 6, 2, 4, 3, 5)
        return F.mse_loss(video[:, :-1] + rows.flatten(5, 6).flatten(3, 4), video[:, 1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    replay = Replay(arguments.data)
    model = Dynamics(replay.actions or 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, clips in enumerate(ClipSampler(replay, 16, 8).batches(0, arguments.steps)):
        video = clips["video"] / 127.5 - 1
        loss = model.loss(video, clips["actions"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step + 1 == arguments.steps:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
