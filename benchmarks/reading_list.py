"""Trains a small model with each option of the heads that stands for a paper, and writes how its losses went.

    python -m benchmarks.reading_list --data data/coinrun

Each row of benchmarks/results/reading-list.json is one run of `mfwm train`: its command, the mean of every logged
number over the first steps and over the last ones, and the errors on levels that it never saw. A run replaces the row
of its name and leaves the others. "measured alone" gives every term so small a weight that the log shows how it goes
where nothing teaches it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mfwm.data.replay import ClipSampler, Replay, split_levels
from mfwm.training import load_model
from mfwm.training.checkpoints import write_atomically
from mfwm.training.run_log import read_log

from mfwm_kernels import video_pyramid

RESULTS = Path(__file__).parent / "results" / "reading-list.json"
# Of both ends of a run, in steps.
FIRST, LAST = 10, 50
MODEL = (
    "--model.patch 8 --model.width 64 --model.layers 2 --model.head-width 32 --model.context 12 "
    "--model.heads.patch-sizes 8 8 4 2 --model.heads.blocks 0 1 1 1 --model.heads.lag-gate"
)
TRAINING = "--batch 4 --clip 20 --lr 3e-3 --warmup 50 --look-every 0 --no-tensorboard --dtype float32"
OPTIONS = {
    "measured alone": "--model.heads.contrast 1e-6 --model.heads.latent-consistency 1e-6 "
    "--model.heads.temporal-difference 1e-6",
    "contrast": "--model.heads.contrast 0.1",
    "latent consistency": "--model.heads.latent-consistency 0.1",
    "temporal difference": "--model.heads.temporal-difference 0.5",
    "latents": "--model.heads.latent 8 --model.heads.kl 1e-3 --kl-warmup 100",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading_list", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a replay buffer of pixels with actions")
    parser.add_argument("--only", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/reading-list"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    for name in arguments.only:
        run = arguments.runs / name.replace(" ", "-")
        command = ["train", "--data", arguments.data, "--out", str(run), *flags(name, arguments.steps)]
        subprocess.run([sys.executable, "-m", "mfwm.cli", *command], check=True)
        row = {
            "name": name,
            "command": shlex.join(["mfwm", *command]),
            "torch": torch.__version__,
            **measures(read_log(run / "log.jsonl")),
            "held_out": held_out(run),
        }
        rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        rows = [other for other in rows if other["name"] != name] + [row]
        write_atomically(arguments.out, (json.dumps(rows, indent=1) + "\n").encode())
        print(json.dumps(row, indent=1))


def flags(name: str, steps: int) -> list[str]:
    """The flags of `mfwm train` for a row."""
    return [*MODEL.split(), *TRAINING.split(), "--steps", str(steps), *OPTIONS[name].split()]


@torch.no_grad()
def held_out(run: Path, clips: int = 32, samples: int = 10) -> dict[str, list[float]]:
    """Mean squared error of every horizon on held-out clips: of its prediction, and where predictions are drawn, of the
    best of some samples of each frame."""
    torch.manual_seed(0)
    model, config, _ = load_model(run)
    replay, horizons = Replay(config.data), config.model.heads.horizons
    _, episodes = split_levels(replay, config.held_out, seed=config.seed)
    given = ClipSampler(replay, config.clip, clips, seed=config.seed, episodes=episodes).batch(0)
    pyramid = video_pyramid(given["video"], horizons.factors, dtype=torch.float32)
    positions, frames = config.model.context, config.clip

    def errors(temperature: float) -> list[torch.Tensor]:
        """Of each horizon, those of the frames that count."""
        predicted = model.predict(given["video"], given["actions"], given["segment_ids"], temperature=temperature)
        found = []
        for i, offset in enumerate(horizons.offsets):
            end = min(positions, frames - offset)
            valid = horizons.valid(i, end, frames, given["segment_ids"])
            error = (predicted[i][:, :end] - pyramid[i][:, offset : offset + end]).square().mean((2, 3, 4))
            found.append(error[valid])
        return found

    result = {"prediction": [error.mean().item() for error in errors(0.0)]}
    if model.heads.draws():
        drawn = [errors(1.0) for _ in range(samples)]
        best = [torch.stack(each).amin(0).mean().item() for each in zip(*drawn, strict=True)]
        result |= {"one sample": [error.mean().item() for error in drawn[0]], f"best of {samples}": best}
    return {name: [round(error, 5) for error in errors] for name, errors in result.items()}


def measures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of every number of a log over its first and last steps. ValueError where one is not finite."""
    names = [name for name in log[0] if name not in ("step", "seconds", "frames_per_second", "data_wait", "lr")]
    found: dict[str, Any] = {"steps": len(log), "first": {}, "last": {}}
    for name in names:
        values = np.array([row[name] for row in log], dtype=float)
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            step = log[wrong[0, 0]]["step"]
            raise ValueError(f"{name} must be finite in every step, got {values[tuple(wrong[0])]} in step {step}")
        for place, part in (("first", values[:FIRST]), ("last", values[-LAST:])):
            found[place][name] = np.round(part.mean(0), 5).tolist()
    return found


if __name__ == "__main__":
    main()
