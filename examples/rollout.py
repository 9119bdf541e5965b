"""Roll out a trained run in a closed loop: with the true actions, with random ones, and in jumps.

    mfwm train --data data/doom --out runs/doom
    python examples/rollout.py runs/doom --gif rollout.gif

The GIF shows, side by side, the true frames, the model's with the true actions, and the model's with random actions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import imageio.v3 as imageio
import torch
from mfwm import random_actions, rollout, rollout_in_jumps, rollout_with_drift
from mfwm.data import Clips, Replay, split_levels
from mfwm.training import load_model

from mfwm_kernels import video_pyramid

CONTEXT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--gif", type=Path, default=Path("rollout.gif"))
    arguments = parser.parse_args()
    steps = arguments.steps
    model, config, _ = load_model(arguments.run)
    replay = Replay(config.data)
    _, held_out = split_levels(replay, config.held_out, seed=config.seed)
    clip = Clips(replay, CONTEXT + steps, episodes=held_out, within_episode=True)[0]
    video, actions = clip["video"][None], clip["actions"][None]
    context = video[:, :CONTEXT]

    frames, drift = rollout_with_drift(model, context, actions, steps)
    random = rollout(model, context, actions[:, :CONTEXT], steps, policy=random_actions(model))
    (truth,) = video_pyramid(video[:, CONTEXT:], (1,))
    error = (frames - truth).square().flatten(2).mean(2)[0]
    for step in range(steps):
        far = " ".join(f"{value:.4f}" for value in drift[0, step, 1:].tolist())
        print(f"step {step + 1}: squared error {error[step]:.4f}; drift of the far horizons {far}")

    horizons = config.model.heads.horizons
    last = len(horizons) - 1
    stride, factor = horizons.offsets[last], horizons.factors[last]
    jumps = steps // stride
    if jumps:
        jumped = rollout_in_jumps(model, context, actions, jumps, last)
        (small,) = video_pyramid(video[:, CONTEXT + stride - 1 :: stride][:, :jumps], (factor,))
        for i, value in enumerate((jumped - small).square().flatten(2).mean(2)[0].tolist()):
            print(f"jump {i + 1}, {stride * (i + 1)} frames ahead at 1/{factor}: squared error {value:.4f}")

    strip = torch.cat([truth, frames, random], dim=-1)[0]
    pictures = ((strip + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    imageio.imwrite(arguments.gif, pictures, duration=100, loop=0)
    print(f"wrote {arguments.gif}")


if __name__ == "__main__":
    main()
