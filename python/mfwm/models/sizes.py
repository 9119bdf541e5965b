"""The demo's world model, trunks of 1M to 1B parameters, and the variants of heads that are compared on each."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mfwm_kernels import Horizons

from .heads_config import HeadsConfig
from .world_model import WorldModelConfig

Size = Literal["1m", "4m", "15m", "60m", "250m", "1b"]

# 4.4 million parameters, with one block per far horizon on a grid of half the resolution. Far losses are larger,
# because more has changed, and with equal weights they dominate the next frame's early in training. Attention reaches
# half the context back, so a rollout can continue without end at one position per frame.
DEMO_MODEL = WorldModelConfig(
    positions="rope",
    window=8,
    heads=HeadsConfig(
        patch_sizes=(8, 8, 4, 2),
        blocks=(0, 1, 1, 1),
        lag_gate=True,
        weights=(1.0, 0.5, 0.25, 0.125),
        near_decoder=64,
        consistency=(0.0, 0.05, 0.05, 0.05),
    ),
)
# Named by the parameters of the trunk, 16 width^2 per layer. From 60M on, tokens are 4 x 4 pixels instead of 8 x 8.
TRUNKS: dict[Size, WorldModelConfig] = {
    "1m": WorldModelConfig(patch=8, width=128, layers=4, head_width=32),
    "4m": WorldModelConfig(patch=8, width=192, layers=6, head_width=32),
    "15m": WorldModelConfig(patch=8, width=384, layers=6, head_width=64),
    "60m": WorldModelConfig(patch=4, width=640, layers=9, head_width=64, positions="rope"),
    "250m": WorldModelConfig(patch=4, width=1024, layers=15, head_width=64, positions="rope", recompute=True),
    "1b": WorldModelConfig(patch=4, width=1792, layers=20, head_width=64, positions="rope", recompute=True),
}
OFFSETS = (1, 2, 4, 8)
# Of the tokens in the article's comparison with Genie.
VOCABULARY = 1024


def trunk_of(size: Size, *, tokens: bool = False, masked: bool = False) -> WorldModelConfig:
    """A trunk that predicts the next frame only, of pixels or with `tokens` of a token per patch; `masked`: MaskGIT."""
    config = replace(TRUNKS[size], heads=HeadsConfig(Horizons.next_frame()))
    if not (tokens or masked):
        return config
    _, height, width = config.frame
    horizons = Horizons((0,), (1,)) if masked else Horizons.next_frame()
    return replace(
        config,
        frame=(1, height // config.patch, width // config.patch),
        patch=1,
        masked=masked,
        heads=HeadsConfig(horizons, output="tokens", vocabulary=VOCABULARY),
    )


def variants(size: Size) -> dict[str, WorldModelConfig]:
    """Models of one size with the heads that are compared, by name."""
    pixels = trunk_of(size)
    cascade = Horizons.cascade(4)
    # Patches at least two of the trunk's tokens wide, so that blocks of far horizons run on a quarter of the tokens.
    grid = tuple(max(1, min(pixels.patch, 2 * pixels.patch // factor)) for factor in cascade.factors)
    blocks = HeadsConfig(cascade, patch_sizes=grid, blocks=(0, 1, 1, 1), lag_gate=True)
    heads = {
        "next frame": pixels.heads,
        "all full size": HeadsConfig(Horizons(OFFSETS, (1, 1, 1, 1))),
        "far ones small": HeadsConfig(Horizons.low_res(OFFSETS, 4)),
        "cascade": HeadsConfig(cascade),
        "one offset at many sizes": HeadsConfig(Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,), 8: (4,)})),
        "small, upsampled": HeadsConfig(Horizons((1, 1, 2, 4, 8), (1, 4, 4, 4, 4)), upsampler=64),
        "small, by analogy": HeadsConfig(
            Horizons((1, 1, 2, 4, 8), (1, 4, 4, 4, 4)), upsampler=64, upsampling="analogy"
        ),
        "cascade, blocks": blocks,
        "cascade, far distributions": replace(blocks, kind=("mse", "gaussian", "gaussian", "gaussian")),
        "cascade, latents": replace(blocks, latent=16),
        "cascade, narrow blocks": replace(blocks, mlp_ratios=(4, 2, 1, 1)),
        "cascade, blocks on inputs": replace(blocks, attend="inputs"),
        "cascade, tapped half way": replace(blocks, tap=pixels.layers // 2),
        "cascade, frames in between": replace(blocks, conditioning="frames", lag_gate=False),
    }
    models = {name: replace(pixels, heads=chosen) for name, chosen in heads.items()}
    token_cascade = HeadsConfig(Horizons(OFFSETS, (1, 2, 4, 4)), output="tokens", vocabulary=VOCABULARY)
    tokens, masked = trunk_of(size, tokens=True), trunk_of(size, masked=True)
    models["tokens, next frame"] = tokens
    models["tokens, cascade"] = replace(tokens, heads=token_cascade)
    models["tokens, raster order"] = replace(tokens, heads=replace(tokens.heads, raster=1))
    models["tokens, masked"] = masked
    models["tokens, masked cascade"] = replace(
        masked, heads=replace(token_cascade, horizons=Horizons((0, 1, 3, 7), (1, 2, 4, 4)))
    )
    return models
