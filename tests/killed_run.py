"""Kills a small training run at random moments, lets it go on, and compares its end with an uninterrupted run.

    python tests/killed_run.py DIR --kills 100 --signal KILL

Every run is a fork of this process, which has imported torch but computed nothing: a run then starts in milliseconds,
and most kills land inside the steps and checkpoints.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

# Every optimiser imports it, which takes a second: once, before the forks.
import torch._dynamo
from mfwm.training import load_model, train
from mfwm.training.checkpoints import Checkpoints
from mfwm.training.run_log import read_log

sys.path.insert(0, str(Path(__file__).parent))
from small_run import moving_squares, small_config

EVERY = 2


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def result(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def must(work: Callable[[], object]) -> None:
    if (status := result(forked(work))) != 0:
        raise SystemExit(f"{work} left with {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder: Path = args.folder
    config = replace(small_config(folder / "data"), steps=8, checkpoint_every=EVERY)
    number = getattr(signal, f"SIG{args.signal}")
    torch.set_num_threads(1)
    must(partial(moving_squares, folder / "data"))

    began = time.monotonic()
    must(partial(train, config, folder / "whole", progress=False))
    whole_seconds = time.monotonic() - began

    draw = random.Random(args.seed)
    kills = runs = lost = 0
    while kills < args.kills or runs == 0:
        run = folder / f"killed-{runs}"
        status = None
        while status != 0:
            child = forked(partial(train, config, run, progress=False))
            if kills < args.kills:
                time.sleep(draw.uniform(0, whole_seconds))
                os.kill(child, number)
            status = result(child)
            # SIGTERM before the run listens for it ends a run that has done nothing.
            if status in (-signal.SIGKILL, 128 + signal.SIGTERM):
                kills += 1
                log = run / "log.jsonl"
                done = len(read_log(log)) if log.exists() else 0
                again = done - (Checkpoints(run / "checkpoints").latest() or 0)
                if not 0 <= again <= (EVERY if status < 0 else 0):
                    raise SystemExit(f"{done} steps were done, and {again} of them are in no checkpoint")
                lost += again
            elif status not in (0, -signal.SIGTERM):
                raise SystemExit(f"{run} left with {status}")
        runs += 1
        must(partial(compare, folder / "whole", run))
    print(f"{kills} x SIG{args.signal} in {runs} runs of {config.steps} steps: {lost} steps done again, ends equal")


def compare(whole: Path, other: Path) -> None:
    (a, _, step_a), (b, _, step_b) = load_model(whole), load_model(other)
    assert step_a == step_b, (step_a, step_b)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    losses = [[(row["step"], row["loss"]) for row in read_log(run / "log.jsonl")] for run in (whole, other)]
    assert losses[0] == losses[1], losses


if __name__ == "__main__":
    main()
