"""What a world model costs: its parameters and FLOPs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from mfwm_kernels import use_backend

from .world_model import WorldModel, WorldModelConfig, parameters_of


class Cost(NamedTuple):
    """Parameters, and forward FLOPs per frame. A training step takes three times as many, plus the loss."""

    parameters: int
    head_parameters: int
    flops: float
    head_flops: float


# A study asks for the same few configs once per cell, and each takes half a second.
@functools.cache
def cost_of(config: WorldModelConfig) -> Cost:
    """Count by running the model on meta tensors: two FLOPs per product, attention with all pairs, also masked ones."""
    # Imported here, because it imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

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
            # As in training, which infers latents from their targets and is given the tokens that it predicts.
            latents: dict[str, Any] = {}
            if model.heads.latents is not None:
                counts = torch.ones(1, T, len(config.heads.horizons), dtype=torch.bool)
                latents = {"targets": video, "counts": counts}
            outputs = model.heads.branched(video=video, **latents, **states).outputs
            if ids:
                model.heads.logits(outputs, video)
    flops, head_flops = trunk.get_total_flops() / T, heads.get_total_flops() / T
    return Cost(parameters_of(model), parameters_of(model.heads), flops + head_flops, head_flops)
