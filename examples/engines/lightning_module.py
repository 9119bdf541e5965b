"""Several horizons in a LightningModule:

python examples/engines/lightning_module.py
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from world import BATCH, HORIZONS, Clips, World


class LitWorld(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        total, per_horizon = self.world(*batch)
        self.log("loss", total, prog_bar=True)
        names = (f"loss of n + {offset}" for offset in HORIZONS.offsets)
        self.log_dict(dict(zip(names, per_horizon.unbind(), strict=True)))
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(steps: int, **trainer: object) -> lightning.Trainer:
    lightning.seed_everything(0)
    fitted = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **trainer)
    fitted.fit(LitWorld(), DataLoader(Clips(steps), BATCH))
    return fitted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    print({name: round(value.item(), 4) for name, value in train(parser.parse_args().steps).callback_metrics.items()})
