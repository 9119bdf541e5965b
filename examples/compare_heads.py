"""Train every option of the heads for a few steps on the same clips, and print how far each loss falls.

    mfwm collect doom --frames 6000 --out data/doom
    python examples/compare_heads.py data/doom

The trunk has 130,000 parameters and 4 x 4 tokens per frame (8 x 8 if they are ids); a step has 4 clips of 16 frames.
The
result shows that an option trains, not which one is best: that takes `mfwm train` and hours.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.data import ClipSampler, Replay
from torch import Tensor

from mfwm_kernels import Horizons, video_pyramid

CASCADE = Horizons.cascade(4)
TOKENS = {"horizons": Horizons((1, 2, 4, 8), (1, 2, 4, 4)), "output": "tokens", "vocabulary": 64}
BLOCKS = {"patch_sizes": (16, 16, 8, 4), "blocks": (0, 2, 1, 1)}
UPSAMPLED = {"horizons": Horizons((1, 1, 2, 4), (1, 4, 4, 4)), "upsampler": 16}
ANY_TWO = ((0.0, 0.1, 0.0, 0.0), (0.0, 0.0, 0.1, 0.0), (0.0, 0.0, 0.0, 0.1), (0.0,) * 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "next frame": {"horizons": Horizons.next_frame()},
    "1 tap": {**BLOCKS, "tap": 1},
    "2 blocks, fewer far": BLOCKS,
    "2 blocks, narrower far": {**BLOCKS, "blocks": (0, 1, 1, 1), "mlp_ratios": (4, 4, 2, 1)},
    "3 blocks on inputs": {**BLOCKS, "attend": "inputs"},
    "4 actions, sum": {},
    "4 actions, gated sum": {"lag_gate": True},
    "4 frames in between": {"conditioning": "frames", **BLOCKS},
    "4 none": {"conditioning": "none"},
    "5 all full": {"horizons": Horizons((1, 2, 4, 8), (1, 1, 1, 1))},
    "5 far ones low": {"horizons": Horizons.low_res((1, 2, 4, 8), 4)},
    "5 one offset, many sizes": {"horizons": Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,)})},
    "5 upsampler": UPSAMPLED,
    "5 analogy": {**UPSAMPLED, "upsampling": "analogy"},
    "5 latents": {"output": "latents", "horizons": Horizons((1, 2, 4, 8), (1, 2, 2, 2))},
    "5 tokens, pooled": TOKENS,
    "5 tokens, shared head": {**TOKENS, "shared_head": True},
    "5 tokens, raster order": {**TOKENS, "raster": 1},
    "5 tokens, biases": {**TOKENS, "bias": True},
    "5 tokens, tokenised": {**TOKENS, "token_targets": "tokenised"},
    "6 near and far": {"consistency": (0.0, 0.1, 0.1, 0.1)},
    "6 near and far, both learn": {"consistency": (0.0, 0.1, 0.1, 0.1), "detach": None},
    "6 any two": {"consistency": ANY_TWO, "detach": "far"},
    "6 tokens": {**TOKENS, "consistency": (0.0, 0.1, 0.1, 0.1)},
    "7 fixed": {"weights": (1.0, 0.5, 0.25, 0.125)},
    "7 uncertainty": {"weighting": "uncertainty"},
    "7 gradient norms": {"weighting": "gradients"},
    "7 surgery": {"surgery": True},
    "7 what moves": {"motion_gain": 4.0},
    "7 l1": {"kind": "l1"},
    "7 far gaussians": {"kind": ("mse", "gaussian", "gaussian", "gaussian")},
    "7 far gaussians, beta": {"kind": ("mse", "gaussian", "gaussian", "gaussian"), "beta": 0.5},
    "7 far laplaces": {"kind": ("mse", "laplace", "laplace", "laplace")},
    "7 latents": {"latent": 8},
    "7 LayerNorm": {"norm": "layer"},
    "8 masked": {**TOKENS, "horizons": Horizons((0, 1, 3, 7), (1, 2, 4, 4))},
}


def colours(video: Tensor, side: int) -> Tensor:
    """Ids [B, T, H, W] below 64: the mean colour of side x side pixels, in four steps per channel."""
    (mean,) = video_pyramid(video, (side,), scale=4 / 256, shift=0.0)
    red, green, blue = mean.clamp(0, 3.99).long().unbind(2)
    return 16 * red + 4 * green + blue


def latents(video: Tensor) -> Tensor:
    """[B, T, 8, 16, 16]: eight fixed projections of each patch of 4 x 4 pixels, with about unit variance."""
    (patches,) = video_pyramid(video, (1,), patch_sizes=(4,))
    directions = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0][:, :8]
    return F.layer_norm((patches @ directions).mT.unflatten(-1, (16, 16)), (8, 16, 16))


def model_for(options: dict[str, Any], actions: int) -> WorldModel:
    heads = HeadsConfig(**{"horizons": CASCADE, **options})
    frame, patch = {"pixels": ((3, 64, 64), 16), "latents": ((8, 16, 16), 4), "tokens": ((1, 8, 8), 1)}[heads.output]
    masked = heads.horizons.offsets[0] == 0
    return WorldModel(WorldModelConfig(frame, patch, 64, 2, 32, 4, 8, actions, masked=masked, heads=heads))


def inputs_of(clips: dict[str, Tensor], heads: HeadsConfig) -> dict[str, Any]:
    """The clip in the form that the heads take."""
    video = clips["video"]
    if heads.output == "tokens":
        inputs: dict[str, Any] = {**clips, "video": colours(video, 8)}
        if heads.token_targets == "tokenised":
            inputs["low_tokens"] = {factor: colours(video, 8 * factor) for factor in set(heads.horizons.factors) - {1}}
        return inputs
    return {**clips, "video": latents(video) if heads.output == "latents" else video}


def train(options: dict[str, Any], replay: Replay, steps: int) -> dict[str, Any]:
    """Losses at both ends of a run: means over the first ten steps and over the last tenth of the steps."""
    torch.manual_seed(0)
    model = model_for(options, replay.actions or 0)
    sampler = ClipSampler(replay, 16, 4, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows, began = [], time.perf_counter()
    for clips in sampler.batches(0, steps):
        loss = model(**inputs_of(clips, model.config.heads))
        optimiser.zero_grad()
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimiser.step()
        rows.append(torch.cat([loss.total.detach()[None], loss.per_horizon, norm[None]]))
    table = torch.stack(rows)
    first, last = table[:10].mean(0), table[-max(10, steps // 10) :].mean(0)
    return {
        "loss": [first[0].item(), last[0].item()],
        "per_horizon": [first[1:-1].tolist(), last[1:-1].tolist()],
        "kinds": model.config.heads.kinds,
        "finite": bool(table.isfinite().all()),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a replay buffer of 64 x 64 frames with discrete actions")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="", help="only options whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    replay, figures = Replay(arguments.data), {}
    for name, options in OPTIONS.items():
        if arguments.only in name:
            figures[name] = result = train(options, replay, arguments.steps)
            (first, last), (before, after) = result["loss"], result["per_horizon"]
            # A likelihood may be negative, so its change is given in nats.
            changes = " ".join(
                f"{new - old:+.2f} nats" if kind in ("gaussian", "laplace") else f"{new / old - 1:+.0%}"
                for kind, old, new in zip(result["kinds"], before, after, strict=True)
            )
            print(
                f"{name:28} {first:8.4f} to {last:8.4f}   per horizon {changes}   {result['seconds']:.0f} s", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
