"""How long a training step of each arm takes, which the column of equal time needs.

It is measured once, before the cells, and kept beside the plan as NAME.seconds.json, so that a study gives the same
results however often it is interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mfwm_kernels import arguments as check
from mfwm_kernels.info import cpu_name

from ..progress import Progress
from ..training.checkpoints import write_atomically
from ..training.run_config import parsed
from ..training.trainer import Run, Trainer
from ..training.world_model import TrainingConfig, objective_of
from .plan import Plan

ROUNDS = 12


def seconds_path(plan_path: Path) -> Path:
    return Path(plan_path).with_suffix(".seconds.json")


def read_seconds(plan: Plan, plan_path: Path) -> dict[str, float] | None:
    """The seconds of a step by arm; None if they have not been measured."""
    path = seconds_path(plan_path)
    if not path.is_file():
        return None
    seconds = parsed(path.read_bytes(), str(path)).get("seconds")
    if not isinstance(seconds, dict) or not set(plan.arms) <= set(seconds):
        raise ValueError(f"{path} must hold seconds for each of {', '.join(plan.arms)}: time the plan again")
    return {arm: check.number(f"{path}: seconds.{arm}", seconds[arm], above=0) for arm in plan.arms}


def measure_seconds(plan: Plan, configs: dict[str, TrainingConfig], plan_path: Path, scratch: Path) -> dict[str, float]:
    """Time a step of every arm, one after another in each round, and write the medians beside the plan.

    On a CPU it is processor time per thread, which other processes disturb little; on a GPU it is wall time.
    Arms that have been timed before keep their seconds, by which their cells were trained; new ones are timed beside
    the first of those, and scaled by what it takes now.
    """
    path = seconds_path(plan_path)
    before = parsed(path.read_bytes(), str(path)) if path.is_file() else {}
    known = before.get("seconds", {})
    first = next((arm for arm in known if arm in configs), None)
    configs = {arm: config for arm, config in configs.items() if arm not in known or arm == first}
    torch.set_num_threads(plan.threads)
    runs: dict[str, Any] = {}
    for arm, config in configs.items():
        config = dataclasses.replace(config, look_every=0, tensorboard=False)
        trainer = Trainer(config, scratch / arm, progress=False).__enter__()
        objective = objective_of(config).to(trainer.device).train()
        runs[arm] = trainer, Run(trainer, objective), next(trainer.sampler().batches(0, 1))
    cuda = torch.cuda.is_available()
    rounds: dict[str, list[float]] = {arm: [] for arm in runs}
    bar = Progress("time", ROUNDS, "round")
    for _ in bar.over(range(ROUNDS)):
        for arm, (_, run, clips) in runs.items():
            began = time.perf_counter() if cuda else time.process_time()
            run.step(0, clips, False)
            if cuda:
                torch.cuda.synchronize()
            rounds[arm].append((time.perf_counter() if cuda else time.process_time()) - began)
    for trainer, *_ in runs.values():
        trainer.__exit__(None, None, None)
    seconds = {arm: statistics.median(times[2:]) for arm, times in rounds.items()}
    scale = 1.0 if first is None else known[first] / seconds[first]
    seconds = {**{arm: scale * value for arm, value in seconds.items()}, **known}
    device = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {plan.threads} threads"
    if first is not None:
        # The seconds are those of the device that the first ones were measured on.
        device = before.get("device", device)
    found = {"seconds": seconds, "device": device, "torch": torch.__version__}
    write_atomically(path, json.dumps(found, indent=2).encode())
    return seconds
