"""Named configs: the runs behind the documented results, one of every size with a block per far horizon, and those of
the article's reading list.

`mfwm train --preset NAME` takes its defaults from one; flags change them.
"""

from __future__ import annotations

from dataclasses import replace

from mfwm_kernels import Horizons

from .models.heads_config import HeadsConfig
from .models.sizes import DEMO_MODEL, TRUNKS, variants
from .models.tokenizer import TokenizerConfig
from .models.world_model import WorldModelConfig
from .reading_list import READING_LIST
from .training.world_model import TrainingConfig

# The run of benchmarks/results/demo.json.
DEMO = TrainingConfig(data="", model=DEMO_MODEL)

# The world model of `mfwm demo --tokens`.
TOKENS = TrainingConfig(
    data="",
    batch=2,
    steps=700,
    lr=2e-3,
    model=WorldModelConfig(
        frame=(1, 8, 8),
        patch=1,
        width=128,
        positions="rope",
        window=8,
        heads=HeadsConfig(
            blocks=(0, 1, 1, 1),
            lag_gate=True,
            output="tokens",
            vocabulary=TokenizerConfig().vocabulary,
            shared_head=True,
            weights=(1.0, 0.5, 0.25, 0.125),
        ),
    ),
)

PRESETS: dict[str, TrainingConfig] = {
    "plain": TrainingConfig(data=""),
    "demo": DEMO,
    "tokens": TOKENS,
    # The demo's trunk and near head with the next frame alone, to compare with.
    "demo-next-frame": replace(
        DEMO,
        model=replace(DEMO_MODEL, heads=HeadsConfig(Horizons.next_frame(), near_decoder=DEMO_MODEL.heads.near_decoder)),
    ),
    **{name: TrainingConfig(data="", model=variants(name)["cascade, blocks"]) for name in TRUNKS},
    **READING_LIST,
}
