"""mfwm describe: parameters and FLOPs of a model size, for each variant of its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import tyro

from .models.cost import cost_of
from .models.sizes import TRUNKS, Size, variants
from .training.world_model import TrainingConfig, training_flops


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


def training_rows(size: Size) -> Iterator[str]:
    """A table of the FLOPs of a training step, with the options that compete with far horizons against drift."""
    models = variants(size)
    next_frame, cascade = (TrainingConfig(data="", model=models[name]) for name in ("next frame", "cascade, blocks"))
    options = {
        "next frame": next_frame,
        "... context noise": replace(next_frame, context_noise=0.3),
        "... rollout loss of 2": replace(next_frame, rollout_loss=2),
        "cascade, blocks": cascade,
        "... without far gradient": replace(cascade, far_gradient=False),
    }
    plain = training_flops(next_frame)
    yield f"{'training':28}{'GFLOP/step':>15}{'tax':>7}"
    for name, config in options.items():
        flops = training_flops(config)
        yield f"{name:28}{flops / 1e9:15.1f}{flops / plain:6.2f}x"


@dataclass
class Describe:
    """Print parameters and FLOPs of a model size, for each variant of its heads and of its training."""

    size: tyro.conf.Positional[Size]

    def run(self) -> None:
        for table in (rows, training_rows):
            for row in table(self.size):
                print(row, flush=True)
