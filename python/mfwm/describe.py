"""mfwm describe: parameters and FLOPs of a model size, for each variant of its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from mfwm_kernels import use_backend

from .models.sizes import TRUNKS, Size, variants
from .models.world_model import WorldModel, WorldModelConfig, parameters_of


class Cost(NamedTuple):
    """Parameters, and forward FLOPs per frame. A training step takes three times as many, plus the loss."""

    parameters: int
    head_parameters: int
    flops: float
    head_flops: float


def cost_of(config: WorldModelConfig) -> Cost:
    """Count by running the model on meta tensors: two FLOPs per product, attention with all pairs, also masked ones."""
    T = config.context
    with torch.device("meta"), torch.no_grad(), use_backend("reference"):
        model = WorldModel(config)
        # Frames past the context, which conditioning "frames" reads.
        frames = T + max(config.heads.horizons.offsets)
        ids = config.heads.output == "tokens"
        video = torch.zeros(1, frames, *model.frame_shape, dtype=torch.int64 if ids else torch.float32)
        actions = torch.zeros(1, frames, dtype=torch.int64) if config.actions else None
        if config.action_size:
            actions = torch.zeros(1, frames, config.action_size)
        with FlopCounterMode(display=False) as trunk:
            states = model.states(video, actions)
        with FlopCounterMode(display=False) as heads:
            model.heads.predict(video=video, **states)
    flops, head_flops = trunk.get_total_flops() / T, heads.get_total_flops() / T
    return Cost(parameters_of(model), parameters_of(model.heads), flops + head_flops, head_flops)


def rows(size: Size) -> Iterator[str]:
    """A table with a row per variant. The tax is its FLOPs over those of the next-frame variant of the same kind."""
    trunk = TRUNKS[size]
    yield f"{size}: width {trunk.width}, {trunk.layers} layers, frames {trunk.frame}, patch {trunk.patch}"
    yield f"{'variant':28}{'parameters':>15}{'of heads':>13}{'GFLOP/frame':>15}{'of heads':>10}{'tax':>7}"
    plain: dict[object, float] = {}
    for name, config in variants(size).items():
        cost = cost_of(config)
        tax = cost.flops / plain.setdefault((config.heads.output, config.masked), cost.flops)
        yield (
            f"{name:28}{cost.parameters:15,}{cost.head_parameters:13,}{cost.flops / 1e9:15.3f}"
            f"{cost.head_flops / cost.flops:10.1%}{tax:6.2f}x"
        )


@dataclass
class Describe:
    """Print parameters and forward FLOPs of a model size, for each variant of its heads."""

    size: tyro.conf.Positional[Size]

    def run(self) -> None:
        for row in rows(self.size):
            print(row, flush=True)
