"""Trains the presets of the reading list on real frames, evaluates them, and writes what came out.

    python -m benchmarks.reading_list --data data/coinrun --tokens data/ids

Each row of benchmarks/results/reading-list.json is one run of `mfwm train`: its commands, the mean of every logged
number over the first steps and over the last ones, and what `mfwm evaluate` measured on levels that it never saw. A run
replaces the row of its name and leaves the others. "measured alone" gives every term so small a weight that the log
shows how it goes where nothing teaches it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mfwm.training.checkpoints import write_atomically
from mfwm.training.run_log import read_log

RESULTS = Path(__file__).parent / "results" / "reading-list.json"
# Of both ends of a run, in steps.
FIRST, LAST = 10, 50
# What a row keeps of metrics.json, where it is there; of lists by step of a rollout, these steps.
KEPT = (
    "clips", "held_out_levels", "parameters", "psnr", "persistence_psnr", "psnr_gain_95", "action_ratio",
    "latent_samples", "latent_best_psnr", "latent_draws_psnr", "latent_prediction_psnr", "latent_best_gain_95",
    "latent_kl", "latent_kl_95", "enlarged_psnr", "upsampler_gain_95", "jumps", "bits_per_token", "bits_per_token_95",
    "accuracy", "persistence_accuracy", "accuracy_gain_95", "temperature",
)  # fmt: skip
BY_STEP = (
    "rollout_psnr", "rollout_ssim", "persistence_rollout_psnr", "persistence_rollout_ssim", "mean_image_rollout_psnr",
    "tokenised_rollout_psnr", "tokenised_rollout_ssim", "against_rollout_psnr", "against_gain_95",
)  # fmt: skip
STEPS = (1, 2, 4, 8, 16, 32)


class Row(NamedTuple):
    """preset, train: of `mfwm train`. evaluate: flags of `mfwm evaluate`; "RUNS/" stands for the folder of the runs.
    tokens: whether the data are ids."""

    preset: str
    train: str = ""
    evaluate: str = ""
    tokens: bool = False


AGAINST = "--against RUNS/next-frame"
DRAWN = "--temperature 1 --steps 8"
ROWS = {
    "measured alone": Row(
        "reading-list",
        "--model.heads.contrast 1e-6 --model.heads.latent-consistency 1e-6 --model.heads.temporal-difference 1e-6",
    ),
    "next frame": Row("reading-list-next-frame"),
    "villegas": Row("villegas", evaluate="--jumps"),
    "villegas, correction": Row("villegas", "--model.heads.upsampling correction", "--jumps"),
    "mspred": Row("mspred", evaluate=f"--jumps {AGAINST}"),
    "svg": Row("svg", evaluate="--samples 10 --jumps"),
    "var": Row("var", evaluate=AGAINST),
    "contrast": Row("contrast"),
    "latent consistency": Row("latent-consistency"),
    "temporal difference": Row("temporal-difference"),
    "motion weights": Row("motion-weights"),
    "tokens at once": Row("reading-list-tokens", evaluate=DRAWN, tokens=True),
    "videogpt": Row("videogpt", evaluate=DRAWN, tokens=True),
    "maskgit": Row("maskgit", evaluate=DRAWN, tokens=True),
    "tokenised": Row("tokenised", evaluate="--steps 8", tokens=True),
    "tokens, pooled": Row("tokenised", "--model.heads.token-targets pooled", "--steps 8", tokens=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading_list", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a replay buffer of pixels with actions")
    parser.add_argument("--tokens", help="the same frames as mfwm encode wrote them, at factors 2 and 4, too")
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--clips", type=int, default=96, help="of the evaluation")
    parser.add_argument("--runs", type=Path, default=Path("runs/reading-list"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.tokens is None and (of_ids := [name for name in arguments.only if ROWS[name].tokens]):
        parser.error(f"--tokens is needed for {', '.join(of_ids)}")
    for name in arguments.only:
        data = arguments.tokens if ROWS[name].tokens else arguments.data
        run = arguments.runs / name.replace(", ", "-").replace(" ", "-")
        commands = commands_of(ROWS[name], run, data, arguments.steps, arguments.clips)
        for command in commands:
            subprocess.run([sys.executable, "-m", "mfwm.cli", *command], check=True)
        row = {
            "name": name,
            "commands": [shlex.join(["mfwm", *command]) for command in commands],
            "torch": torch.__version__,
            **measures(read_log(run / "log.jsonl")),
            "held_out": kept(json.loads((run / "metrics.json").read_text())),
        }
        write_row(arguments.out, row)
        print(json.dumps(row, indent=1))


def commands_of(row: Row, run: Path, data: str, steps: int, clips: int) -> list[list[str]]:
    """Arguments of `mfwm train` and of `mfwm evaluate`."""
    train = ["train", "--preset", row.preset, "--data", data, "--out", str(run), *row.train.split()]
    evaluate = ["evaluate", str(run), "--clips", str(clips)]
    evaluate += row.evaluate.replace("RUNS/", f"{run.parent}/").split()
    return [[*train, "--steps", str(steps), "--no-tensorboard"], evaluate]


def write_row(out: Path, row: dict[str, Any]) -> None:
    """Put the row in place of the one of its name, or after all others."""
    rows = {other["name"]: other for other in (json.loads(out.read_text()) if out.exists() else [])}
    rows[row["name"]] = row
    write_atomically(out, (json.dumps(list(rows.values()), indent=1) + "\n").encode())


def kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that a row holds."""
    found = {name: rounded(metrics[name]) for name in KEPT if name in metrics}
    for name in BY_STEP:
        if name in metrics:
            found[name] = {str(s): rounded(metrics[name][s - 1]) for s in STEPS if s <= len(metrics[name])}
    return found


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


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
