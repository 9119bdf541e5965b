"""Named configs: sizes of world models from 1M to 1B parameters, heads to compare, the run of each documented result.

`mfwm train --preset NAME` starts from one, and flags change it from there.
"""

from __future__ import annotations

from dataclasses import replace

from mfwm_kernels import Horizons

from .heads_config import HeadsConfig
from .model import WorldModelConfig
from .training import TrainingConfig

# Named by the parameters of the trunk, 16 width^2 a layer. From 60M on, four pixels a token instead of eight.
TRUNKS: dict[str, WorldModelConfig] = {
    "1m": WorldModelConfig(patch=8, width=128, layers=4, head_width=32),
    "4m": WorldModelConfig(patch=8, width=192, layers=6, head_width=32),
    "15m": WorldModelConfig(patch=8, width=384, layers=6, head_width=64),
    "60m": WorldModelConfig(patch=4, width=640, layers=9, head_width=64, positions="rope"),
    "250m": WorldModelConfig(patch=4, width=1024, layers=15, head_width=64, positions="rope", recompute=True),
    "1b": WorldModelConfig(patch=4, width=1792, layers=20, head_width=64, positions="rope", recompute=True),
}
OFFSETS = (1, 2, 4, 8)


def on_grid(horizons: Horizons, patch: int) -> tuple[int, ...]:
    """Output patches that pool the token grid by half the factor: blocks of small targets are then cheap."""
    return tuple(max(1, min(patch, 2 * patch // factor)) for factor in horizons.factors)


def variants(patch: int) -> dict[str, HeadsConfig]:
    """The heads that are compared, by name."""
    cascade = Horizons.cascade(4)
    blocks = HeadsConfig(cascade, patch_sizes=on_grid(cascade, patch), blocks=(0, 1, 1, 1), lag_gate=True)
    many = Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,), 8: (4,)})
    return {
        "next frame": HeadsConfig(Horizons.next_frame()),
        "all full size": HeadsConfig(Horizons(OFFSETS, (1, 1, 1, 1))),
        "far ones small": HeadsConfig(Horizons.low_res(OFFSETS, 4)),
        "cascade": HeadsConfig(cascade),
        "one offset at many sizes": HeadsConfig(many),
        "cascade, blocks": blocks,
        "cascade, narrow blocks": replace(blocks, mlp_ratios=(4, 2, 1, 1)),
        "cascade, blocks on inputs": replace(blocks, attend="inputs"),
        "cascade, frames in between": replace(blocks, conditioning="frames", lag_gate=False),
        "small, upsampled": HeadsConfig(Horizons((1, 1, 2, 4, 8), (1, 4, 4, 4, 4)), upsampler=64),
    }


def preset(name: str, heads: str = "cascade, blocks") -> WorldModelConfig:
    """The model of a size with the heads of a name."""
    trunk = TRUNKS[name]
    return replace(trunk, heads=variants(trunk.patch)[heads])


# The run of benchmarks/results/demo.json: 4.3 million parameters; one block per far horizon on a grid of half the
# resolution. Far losses are larger (the world has moved on), and with equal weights they crowd out the next frame early
# in training.
DEMO = TrainingConfig(
    data="",
    model=WorldModelConfig(
        heads=HeadsConfig(
            patch_sizes=(8, 8, 4, 2),
            blocks=(0, 1, 1, 1),
            lag_gate=True,
            weights=(1.0, 0.5, 0.25, 0.125),
            consistency=(0.0, 0.05, 0.05, 0.05),
        )
    ),
)

PRESETS = {
    "plain": TrainingConfig(data=""),
    "demo": DEMO,
    # The demo's trunk with the next frame alone: what several frames are compared with.
    "demo-next-frame": replace(DEMO, model=replace(DEMO.model, heads=HeadsConfig(Horizons.next_frame()))),
    **{name: TrainingConfig(data="", model=preset(name)) for name in TRUNKS},
}
