"""Several horizons in a loop of Hugging Face Accelerate:

python examples/engines/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/engines/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from world import BATCH, Clips, World


def train(steps: int, accelerator: Accelerator) -> list[float]:
    """The losses of the global batches."""
    set_seed(0)
    model = World()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(Clips(steps), BATCH // accelerator.num_processes)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    losses = []
    for video, actions in loader:
        total, per_horizon = model(video, actions)
        optimiser.zero_grad()
        accelerator.backward(total)
        optimiser.step()
        shown = accelerator.reduce(torch.cat([total.detach()[None], per_horizon.detach()]), "mean")
        losses.append(shown[0].item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}, horizons {shown[1:].tolist()}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    train(parser.parse_args().steps, Accelerator())
