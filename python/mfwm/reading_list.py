"""Presets of the article's reading list: one small model per paper, all on the same trunk and the same few steps.

docs/reading_list.md has the papers, and what came out. Each preset changes one thing, so that its run can be compared
with that of "cascade" or of "next-frame".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mfwm_kernels import Horizons

from .models.heads_config import HeadsConfig
from .models.tokenizer import TokenizerConfig
from .models.world_model import WorldModelConfig
from .training.world_model import TrainingConfig

# 0.38M parameters with the cascade's heads: 500 steps take a minute or two of one CPU thread.
CASCADE = HeadsConfig(patch_sizes=(8, 8, 4, 2), blocks=(0, 1, 1, 1), lag_gate=True)

# Of ids of 8 x 8 tokens, as `mfwm train-tokenizer` and `mfwm encode` write them by default from frames of 64 x 64.
NEXT_TOKENS = HeadsConfig(Horizons.next_frame(), output="tokens", vocabulary=TokenizerConfig().vocabulary)


def training(heads: HeadsConfig, **options: Any) -> TrainingConfig:
    tokens = heads.output == "tokens"
    model = WorldModelConfig(
        frame=(1, 8, 8) if tokens else (3, 64, 64),
        patch=1 if tokens else 8,
        width=64,
        layers=2,
        context=12,
        masked=heads.horizons.offsets[0] == 0,
        heads=heads,
    )
    return TrainingConfig(
        data="", steps=500, batch=4, clip=20, lr=3e-3, warmup=50, look_every=0, dtype="float32", model=model, **options
    )


READING_LIST: dict[str, TrainingConfig] = {
    "reading-list": training(CASCADE),
    "reading-list-next-frame": training(HeadsConfig(Horizons.next_frame())),
    # Villegas et al., arXiv 1704.05831.
    "villegas": training(
        HeadsConfig(
            Horizons((4, 4), (1, 4)),
            patch_sizes=(8, 4),
            blocks=(0, 1),
            lag_gate=True,
            upsampler=32,
            upsampling="analogy",
        )
    ),
    # MSPred, arXiv 2203.09303.
    "mspred": training(
        HeadsConfig(Horizons((1, 4, 8), (1, 4, 8)), patch_sizes=(8, 4, 2), blocks=(0, 1, 1), lag_gate=True)
    ),
    # SVG with a learned prior, arXiv 1802.07687.
    "svg": training(replace(CASCADE, latent=8, kl=1e-3), kl_warmup=100),
    # VAR, arXiv 2404.02905: the next frame at every scale.
    "var": training(
        HeadsConfig(Horizons.multi_resolution({1: (1, 2, 4, 8)}), patch_sizes=(8, 8, 4, 2), blocks=(0, 1, 1, 1))
    ),
    "reading-list-tokens": training(NEXT_TOKENS),
    # VideoGPT, arXiv 2104.10157: tokens in raster order.
    "videogpt": training(replace(NEXT_TOKENS, raster=2)),
    # MaskGIT, arXiv 2202.04200, as in Genie, 2402.15391.
    "maskgit": training(replace(NEXT_TOKENS, horizons=Horizons((0,), (1,)))),
    # Far frames at low resolution, as ids of tokenizers of their own.
    "tokenised": training(
        replace(
            NEXT_TOKENS,
            horizons=Horizons((1, 2, 4), (1, 2, 4)),
            blocks=(0, 1, 1),
            token_targets="tokenised",
            lag_gate=True,
        )
    ),
    # TCLR, arXiv 2101.07974, and GRWM, 2510.26782.
    "contrast": training(replace(CASCADE, contrast=0.1)),
    # LSE-MTP, arXiv 2604.06155.
    "latent-consistency": training(replace(CASCADE, latent_consistency=0.1)),
    # Motion consistency by differences in time, and by weights for what moves (LTD, arXiv 2601.20504).
    "temporal-difference": training(replace(CASCADE, temporal_difference=0.5)),
    "motion-weights": training(replace(CASCADE, motion_gain=1.0)),
}
