"""A world model of three horizons on frames of 16 x 16, and clips for it."""

from __future__ import annotations

from typing import Any

import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.models.frame_decoder import FrameDecoder
from torch import nn

from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4), (1, 2, 4))


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
