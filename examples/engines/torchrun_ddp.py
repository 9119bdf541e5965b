"""Several horizons under DistributedDataParallel:

    torchrun --nproc-per-node 2 examples/engines/torchrun_ddp.py

The heads are part of the module, so nothing is particular to them. Every process takes its share of each global batch.
All clips are whole, so every process counts the same number of predictions, and the mean of the processes' losses is
the loss of the global batch; where episodes end within clips, docs/training.md says how `mfwm train` weighs them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from world import BATCH, Clips, World


def prepare(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def train(steps: int, device: torch.device, prepare: Callable[[nn.Module], nn.Module]) -> list[float]:
    """The losses of the global batches."""
    torch.manual_seed(0)
    model = prepare(World().to(device))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clips = Clips(steps)
    sampler: DistributedSampler[tuple[torch.Tensor, torch.Tensor]] = DistributedSampler(clips, shuffle=False)
    losses = []
    for video, actions in DataLoader(clips, BATCH // dist.get_world_size(), sampler=sampler):
        total, per_horizon = model(video.to(device), actions.to(device))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        shown = torch.cat([total.detach()[None], per_horizon.detach()])
        dist.all_reduce(shown)
        shown /= dist.get_world_size()
        losses.append(shown[0].item())
        if dist.get_rank() == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}, horizons {[round(x, 4) for x in shown[1:].tolist()]}")
    return losses


def main(prepare: Callable[[nn.Module], nn.Module]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(steps, device, prepare)
    dist.barrier()  # No process closes its connections while another one still uses them.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(prepare)
