"""Pictures of rollouts of several arms beside the truth."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import torch

from mfwm_kernels import video_pyramid

from ..evaluation.held_out import HeldOut
from ..evaluation.report import picture, plt, show
from ..evaluation.world_model import CONTEXT
from ..models.rollouts import rollout
from ..training.world_model import load_model
from .cell import config_of, snapshot_path, world_path
from .plan import Cell, Plan
from .results import Results

STEPS = (1, 2, 4, 8, 12, 16, 24, 32)
CLIPS = 2


def rollout_pictures(plan: Plan, results: Results, out: Path) -> dict[str, str]:
    """By world, an <img>: for two held-out clips, the truth and a rollout of each arm, all of one seed.

    It is the seed with most runs in this directory, and the first of several such seeds.
    """
    found = {}
    for world in results.worlds():
        here: dict[int, list[str]] = {}
        for arm in results.arms(world):
            for seed in results.seeds(world, arm):
                if snapshot_of(results, out, Cell(world, arm, seed)).is_dir():
                    here.setdefault(seed, []).append(arm)
        if here:
            seed = max(sorted(here), key=lambda seed: len(here[seed]))
            found[world] = of_world(plan, results, out, world, here[seed], seed)
    return found


def snapshot_of(results: Results, out: Path, cell: Cell) -> Path:
    """Where the run of a cell is kept, as it was after as many steps as all arms."""
    return snapshot_path(out, cell, results.cells[cell.world, cell.arm, cell.seed]["steps"]["at"])


def of_world(plan: Plan, results: Results, out: Path, world: str, arms: list[str], seed: int) -> str:
    config = config_of(plan, Cell(world, arms[0], seed), out, plan.steps)
    draw, most = np.random.default_rng(0), CONTEXT + STEPS[-1]
    held_out = HeldOut(config, None, world_path(out, world), length=config.clip, most=most, count=CLIPS, draw=draw)
    steps = [step for step in STEPS if step <= held_out.clips.length - CONTEXT]
    clips = held_out.clips.batch(np.sort(held_out.chosen))
    (truth,) = video_pyramid(clips["video"], (1,), dtype=torch.float32)
    rows = {"truth": truth[:, CONTEXT:]}
    for arm in arms:
        model, _, _ = load_model(snapshot_of(results, out, Cell(world, arm, seed)))
        rows[arm] = rollout(model, clips["video"][:, :CONTEXT], clips["actions"], steps[-1])
    lines = len(rows) * len(held_out.chosen)
    figure, axes = plt.subplots(lines, len(steps) + 1, figsize=(len(steps) + 2, lines))
    for clip in range(len(held_out.chosen)):
        for line, (name, frames) in enumerate(rows.items(), start=clip * len(rows)):
            show(axes[line, 0], truth[clip, CONTEXT - 1], name)
            for column, step in enumerate(steps, start=1):
                show(axes[line, column], frames[clip, step - 1], f"+{step}" if line == 0 else "")
    figure.tight_layout()
    note = f"Left: the last of {CONTEXT} frames seen. Seed {seed}, {plan.steps} steps of training."
    return f"<h3>Rollouts</h3>{picture(figure)}<p class='note'>{html.escape(note)}</p>"
