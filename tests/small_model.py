"""A world model of three horizons on frames of 16 x 16, its options by name, and clips for it."""

from __future__ import annotations

from typing import Any

import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.models.frame_decoder import FrameDecoder
from torch import nn

from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4), (1, 2, 4))
TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
MASKED: dict[str, Any] = {**TOKENS, "horizons": Horizons((0, 1, 3), (1, 2, 4)), "trunk": {"masked": True}}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2)},
    "narrow blocks": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2), "mlp_ratios": (4, 2, 1)},
    "blocks on inputs": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2), "attend": "inputs"},
    "tap": {"tap": 1, "blocks": (0, 0, 1)},
    "gated": {"lag_gate": True},
    "no norm, equal start": {"norm": None, "residual": False},
    "consistency": {"consistency": (0.0, 0.3, 0.3), "detach": None, "weights": (1.0, 0.5, 0.25)},
    "consistency of any two": {"consistency": ((0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.0,) * 3), "detach": "far"},
    "uncertainty": {"weighting": "uncertainty"},
    "tokens, tokenised, uncertainty": {**TOKENS, "token_targets": "tokenised", "weighting": "uncertainty"},
    "balanced gradients": {"weighting": "gradients", "blocks": (0, 1, 1), "patch_sizes": (4, 4, 2)},
    "surgery": {"surgery": True},
    "surgery on balanced gradients": {"surgery": True, "weighting": "gradients", "tap": 1},
    "contrast": {"contrast": 0.5, "tap": 1},
    "latent consistency": {"latent_consistency": 0.3},
    "latent consistency of tokens": {**TOKENS, "latent_consistency": 0.3, "blocks": (0, 1, 1)},
    "latent consistency with frames": {"latent_consistency": 0.3, "conditioning": "frames"},
    "temporal difference": {"temporal_difference": 0.5},
    "latent": {"latent": 3},
    "latent, blocks on inputs, tap": {"latent": 3, "blocks": (0, 1, 1), "attend": "inputs", "tap": 1},
    "no actions": {"conditioning": "none"},
    "frames": {"conditioning": "frames", "blocks": (0, 1, 1), "patch_sizes": (4, 4, 2)},
    "frames, no blocks, tap": {"conditioning": "frames", "tap": 1},
    "all full size": {"horizons": Horizons((1, 2, 4), (1, 1, 1))},
    "far ones small": {"horizons": Horizons.low_res((1, 2, 4), 2)},
    "one offset at many sizes": {"horizons": Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,)})},
    "frames at many sizes": {
        "horizons": Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,)}),
        "patch_sizes": (4, 4, 2, 4, 2),
        "conditioning": "frames",
    },
    "upsampler": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8},
    "analogy": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8, "upsampling": "analogy"},
    "upsampler, tap": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8, "tap": 1, "residual": False},
    "near decoder": {"near_decoder": 8},
    "near decoder, tap": {"near_decoder": 8, "output": "latents", "kind": ("gaussian", "mse", "mse"), "tap": 1},
    "near decoder, frames": {"near_decoder": 8, "conditioning": "frames", "residual": False},
    "latents": {"output": "latents"},
    "tokens": {**TOKENS, "consistency": (0.0, 0.1, 0.1)},
    "tokens, shared head": {**TOKENS, "shared_head": True, "blocks": (0, 1, 1)},
    "raster": {**TOKENS, "raster": 2, "blocks": (0, 1, 1)},
    "raster, three ids": {**TOKENS, "ids": 3, "raster": 1, "tap": 1},
    "tokens of three ids": {**TOKENS, "ids": 3, "blocks": (0, 1, 1), "attend": "inputs"},
    "tokens, tokenised": {**TOKENS, "token_targets": "tokenised"},
    "tokens, frames": {**TOKENS, "conditioning": "frames"},
    "masked": MASKED,
    "masked, blocks, tap": {**MASKED, "blocks": (1, 0, 1), "tap": 1},
}


def build(*, ids: int = 1, trunk: dict[str, Any] | None = None, **options: Any) -> WorldModel:
    heads = HeadsConfig(**{"horizons": HORIZONS, **options})
    tokens = heads.output == "tokens"
    config = WorldModelConfig(
        (ids, 8, 8) if tokens else (3, 16, 16),
        1 if tokens else 4,
        32,
        head_width=16,
        context=6,
        **{"layers": 2, "actions": 0 if heads.conditioning == "none" else 5, **(trunk or {})},
        heads=heads,
    )
    model = WorldModel(config)
    # Heads that start at zero predict nothing that could leak.
    for head in model.heads.heads:
        if isinstance(head, (nn.Linear, FrameDecoder)):
            nn.init.normal_((head if isinstance(head, nn.Linear) else head.conv_out).weight, std=0.1)
    if model.heads.upsampler is not None:
        nn.init.normal_(model.heads.upsampler.conv_out.weight, std=0.1)
    return model


def clip(frames: int = 6, model: WorldModel | None = None) -> dict[str, Any]:
    """Random video and actions of the model's kind."""
    actions = torch.randint(0, 5, (2, frames))
    heads = HeadsConfig() if model is None else model.config.heads
    if model is not None and model.tokens:
        video = torch.randint(0, heads.vocabulary, (2, frames, *model.frame_shape))
    elif heads.output == "latents":
        video = 3 * torch.randn(2, frames, 3, 16, 16)
    else:
        video = torch.randint(0, 256, (2, frames, 3, 16, 16), dtype=torch.uint8)
    return {"video": video, "actions": None if model is not None and model.action is None else actions}


def targets(model: WorldModel, clips: dict[str, Any]) -> dict[str, Any]:
    """The clips with what else the loss of the model needs."""
    if model.config.heads.token_targets == "pooled":
        return clips
    frames = clips["video"].shape[1]
    low = {f: torch.randint(0, 7, (2, frames, 8 // f, 8 // f)) for f in (2, 4)}
    return {**clips, "low_tokens": low}
