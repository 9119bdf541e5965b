"""One cell of a study: a training run, and an evaluation at the number of steps of each column.

A cell's directory holds the training run in `run`, and for each number of steps a copy of it as it was then, such as
`at-00001000`: a run of its own, with the metrics.json and clips.npz of its evaluation. Each is complete or absent, so a
cell that was killed resumes where it was.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.replay import Clips, Replay, split_levels
from ..evaluation.held_out import clip_length
from ..evaluation.positions import objects_of
from ..evaluation.world_model import CONTEXT, STEPS, evaluate
from ..training.checkpoints import Checkpoints, flush_directory
from ..training.data_identity import digest, resolved
from ..training.run_config import compare, parsed
from ..training.run_lock import locked
from ..training.world_model import TrainingConfig, for_replay, train, training_flops
from .plan import Cell, Plan, read_plan
from .timing import read_seconds

# Frequent enough that little is lost when a cell is killed.
CHECKPOINT_EVERY = 100
# What the directory of a snapshot that is being copied begins with.
BESIDE = ".unfinished-"
# Seconds to wait for a process of a killed study, which saves a checkpoint before it ends.
PATIENCE = 120.0


def world_path(out: Path, world: str) -> Path:
    return out / "worlds" / world


# Opened once, because a study asks for every cell.
@functools.cache
def recorded(data: Path) -> Replay:
    return Replay(data)


@functools.cache
def recorded_digest(data: Path) -> str:
    return digest(recorded(data))


def config_of(plan: Plan, cell: Cell, out: Path, steps: int) -> TrainingConfig:
    """The config of a cell's run."""
    data = world_path(out, cell.world)
    config = replace(plan.training_config(cell.arm), data=str(data), seed=cell.seed, steps=steps)
    return for_replay(config, recorded(data))


def budgets_of(plan: Plan, cell: Cell, out: Path, plan_path: Path) -> dict[str, int]:
    """The steps of each column of a cell. That of time is left out where the plan's arms have not been timed."""
    arms = {cell.arm, plan.compute}
    costs = {"flops": {arm: training_flops(config_of(plan, replace(cell, arm=arm), out, plan.steps)) for arm in arms}}
    seconds = read_seconds(plan, plan_path)
    return plan.budgets(cell.arm, costs if seconds is None else {**costs, "time": seconds})


def snapshot_path(out: Path, cell: Cell, steps: int) -> Path:
    return out / cell.folder / f"at-{steps:08d}"


def train_cell(plan: Plan, cell: Cell, out: Path, budgets: dict[str, int]) -> None:
    """Train to each number of steps, and copy the run there."""
    config = replace(config_of(plan, cell, out, max(budgets.values())), checkpoint_every=CHECKPOINT_EVERY)
    run = out / cell.folder / "run"
    for unfinished in run.parent.glob(f"{BESIDE}*"):
        shutil.rmtree(unfinished)
    for steps in sorted(set(budgets.values())):
        snapshot = snapshot_path(out, cell, steps)
        if not snapshot.is_dir():
            trained = Checkpoints(run / "checkpoints").steps()
            if trained and max(trained) > steps and steps not in trained:
                raise ValueError(
                    f"{run} was trained past step {steps} without keeping a checkpoint there: delete {run.parent}, or "
                    "leave out the column that needs that step"
                )
            train(config, run, progress=False, stop_after=steps)
            copy_run(run, snapshot, steps)


def evaluate_cell(plan: Plan, cell: Cell, out: Path, budgets: dict[str, int]) -> None:
    """Evaluate the cell at each number of steps, on the same clips in all cells of a world and seed.

    The hidden state is probed at equal steps only, because the probes take as long as the rest.
    """
    data, reader = world_path(out, cell.world), None
    if objects_of(recorded(data)):
        reader = out / "readers" / f"{cell.world}-{cell.seed}.safetensors"
        reader.parent.mkdir(exist_ok=True)
    for steps in sorted(set(budgets.values())):
        snapshot = snapshot_path(out, cell, steps)
        if not (snapshot / "metrics.json").is_file():
            probes = steps == plan.steps
            options: dict[str, Any] = {"steps": rollout_steps(plan), "clips": plan.clips, "probes": probes}
            evaluate(snapshot, data=data, reader=reader, progress=False, **options)


def rollout_steps(plan: Plan) -> int:
    """The steps of an evaluation's rollouts, where its episodes are long enough."""
    return max(STEPS, plan.endpoint.steps[1])


def check_endpoint(plan: Plan, out: Path) -> dict[tuple[str, int], dict[str, int]]:
    """What an evaluation's metrics say of its clips, by world and seed.

    ValueError where a world cannot give the endpoint: it needs objects, or its episodes are too short.
    """
    found: dict[tuple[str, int], dict[str, int]] = {}
    for cell in plan.cells():
        at = (cell.world, cell.seed)
        if at in found:
            continue
        data, last = world_path(out, cell.world), plan.endpoint.steps[1]
        if plan.endpoint.measure == "position_error" and not objects_of(recorded(data)):
            raise ValueError(
                f"endpoint.measure must be rollout_mse or gain with worlds.{cell.world}, whose state holds no positions"
            )
        config, replay = config_of(plan, cell, out, plan.steps), recorded(data)
        _, episodes = split_levels(replay, config.held_out, seed=config.seed)
        length = clip_length(replay, episodes, config.clip, CONTEXT + rollout_steps(plan))
        clips, steps = Clips(replay, length, episodes=episodes, within_episode=True), length - CONTEXT
        if steps < last:
            raise ValueError(
                f"endpoint.steps must end by step {steps}, as far as rollouts of worlds.{cell.world} reach in its "
                f"held-out episodes of seed {cell.seed}; got {last}"
            )
        found[at] = {"clips": min(plan.clips, len(clips)), "rollout_steps": min(steps, rollout_steps(plan))}
    return found


def check_done(plan: Plan, cell: Cell, out: Path, budgets: dict[str, int], measured: dict[str, int]) -> None:
    """ValueError where what is done of a cell is not of this plan, which was edited then."""
    run = out / cell.folder / "run"
    snapshots = [snapshot_path(out, cell, steps) for steps in set(budgets.values())]
    started = [place for place in (run, *snapshots) if (place / "config.json").is_file()]
    if started:
        config = config_of(plan, cell, out, max(budgets.values()))
        config = replace(config, data=resolved(config.data))
        for place in started:
            compare(config, place, recorded_digest(world_path(out, cell.world)))
    for place in snapshots:
        path = place / "metrics.json"
        metrics = parsed(path.read_bytes(), str(path)) if path.is_file() else measured
        for name, value in measured.items():
            if metrics.get(name) != value:
                raise ValueError(
                    f"{cell} was evaluated with {name} = {metrics.get(name)}, and not {value} as this plan has it: "
                    f"delete {path} to evaluate it again"
                )


def copy_run(run: Path, snapshot: Path, steps: int) -> None:
    """Copy a run's config, log and checkpoint of `steps` steps to `snapshot`, written beside and renamed."""
    unfinished = snapshot.with_name(f"{BESIDE}{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name in ("config.json", "log.jsonl"):
            shutil.copyfile(run / name, unfinished / name)
        source = Checkpoints(run / "checkpoints").path(steps)
        shutil.copytree(source, Checkpoints(unfinished / "checkpoints").path(steps))
        os.replace(unfinished, snapshot)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    flush_directory(snapshot.parent)


def stop_with(parent: int) -> None:
    """Stop this process as SIGTERM does, with a checkpoint, when its parent is gone: killed, it could not say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock the cell, once a process of a study that was killed has let it go."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        yield


def main() -> None:
    """python -m mfwm.study.cell PARENT PLAN OUT WORLD ARM SEED [train]: a process of `mfwm study`, process PARENT."""
    parent, plan_path, out, world, arm, seed, *only = sys.argv[1:]
    threading.Thread(target=stop_with, args=(int(parent),), daemon=True).start()
    plan, cell = read_plan(Path(plan_path)), Cell(world, arm, int(seed))
    torch.set_num_threads(plan.threads)
    with held(Path(out) / cell.folder):
        budgets = budgets_of(plan, cell, Path(out), Path(plan_path))
        train_cell(plan, cell, Path(out), budgets)
        if not only:
            evaluate_cell(plan, cell, Path(out), budgets)


if __name__ == "__main__":
    main()
