"""Trains a small model with each option of the heads that stands for a paper, and writes how its losses went.

    python -m benchmarks.reading_list --data data/coinrun

Each row of benchmarks/results/reading-list.json is one run of `mfwm train`: its command, and the mean of every logged
number over the first steps and over the last ones. A run replaces the row of its name and leaves the others. "measured
alone" gives every term so small a weight that the log shows how it goes where nothing teaches it.
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
from mfwm.training.checkpoints import write_atomically
from mfwm.training.run_log import read_log

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
        }
        rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        rows = [other for other in rows if other["name"] != name] + [row]
        write_atomically(arguments.out, (json.dumps(rows, indent=1) + "\n").encode())
        print(json.dumps(row, indent=1))


def flags(name: str, steps: int) -> list[str]:
    """The flags of `mfwm train` for a row."""
    return [*MODEL.split(), *TRAINING.split(), "--steps", str(steps), *OPTIONS[name].split()]


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
