"""host_trainer.py with heads for frames n + 1, n + 2, n + 4 and n + 8.

    diff examples/host_trainer.py examples/host_trainer_multi_frame.py

shows the whole change. It also prints the cosines between the horizons' gradients in the shared hidden state.
"""

from __future__ import annotations

import argparse

import torch
from mfwm import HeadsConfig, MultiFrameHeads
from mfwm.data import ClipSampler, Replay
from torch import Tensor, nn

from mfwm_kernels import GradMonitor, HorizonLoss

PATCH, WIDTH = 8, 96


class Dynamics(nn.Module):
    """Embeds the patches of a frame, mixes them by a convolution, and runs a GRU over time at each patch."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.action = nn.Embedding(actions, WIDTH)
        self.mix = nn.Sequential(nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU())
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.heads = MultiFrameHeads(WIDTH, PATCH, HeadsConfig(weights=(1.0, 0.5, 0.25, 0.125)))
        self.to_come = nn.Embedding(actions, WIDTH)

    def hidden(self, video: Tensor, actions: Tensor) -> Tensor:
        """[B, T, H, W, D] for frames [B, T, 3, height, width]: position n has seen frames and actions up to n."""
        B, T = video.shape[:2]
        x = self.mix(self.embed(video.flatten(0, 1))).unflatten(0, (B, T)).permute(0, 3, 4, 1, 2)
        x = x + self.action(actions)[:, None, None]
        grid = x.shape[:3]
        out, _ = self.gru(x.flatten(0, 2))
        return (x + out.unflatten(0, grid)).permute(0, 3, 1, 2, 4)

    def loss(self, video: Tensor, actions: Tensor, monitor: GradMonitor) -> HorizonLoss:
        return self.heads(self.hidden(video, actions), self.to_come(actions), video, grad_monitor=monitor)


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
        loss = model.loss(video, clips["actions"], monitor := GradMonitor(4))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        if step % 20 == 0 or step + 1 == arguments.steps:
            print(f"step {step}: losses {loss.per_horizon.tolist()}", flush=True)
            print("cosines", monitor.cosines.round(decimals=2).tolist())


if __name__ == "__main__":
    main()
