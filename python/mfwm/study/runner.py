"""mfwm study: trains and evaluates the cells of a plan, several side by side, and writes what came out.

The study's directory holds the recorded worlds, a directory for each cell, results.json and index.html. A study that
was killed resumes where it was: whatever is complete is not done again, and the results are the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfwm_kernels import arguments as check

from ..data.collect import collect
from ..data.place import restore
from ..progress import Progress
from ..training.checkpoints import Checkpoints, write_atomically
from ..training.run_config import parsed
from ..training.run_lock import locked
from .cell import budgets_of, check_done, check_endpoint, config_of, recorded, snapshot_path, world_path
from .page import write_page
from .plan import Cell, World, read_plan
from .results import Results, known_cells, write_results
from .rollouts import rollout_pictures
from .timing import measure_seconds

# Seconds between looks at the processes.
POLL = 0.5
# A process that was asked to stop saves a checkpoint first.
PATIENCE = 120.0


@dataclass
class Running:
    cell: Cell
    process: subprocess.Popen[bytes]


class Study:
    """A plan and the directory that it is run in. Cells that the results files in `merge` hold are not run."""

    def __init__(self, plan_path: Path, out: Path, merge: tuple[Path, ...] = ()) -> None:
        self.plan_path, self.out, self.merge = Path(plan_path), Path(out), merge
        self.plan = read_plan(self.plan_path)

    def record_worlds(self) -> None:
        """Record each world that is not there yet, and check the others."""
        for name, world in self.plan.worlds.items():
            place = world_path(self.out, name)
            restore(place)
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(description_path(place), json.dumps(dataclasses.asdict(world), indent=2).encode())
                collect(out=place, **world.collect_arguments())
            check_world(name, world, place)

    def time_arms(self) -> dict[str, float]:
        """Measure the seconds of a step of each arm, on the first world."""
        self.record_worlds()
        world, seed = next(iter(self.plan.worlds)), self.plan.seeds[0]
        configs = {
            arm: config_of(self.plan, Cell(world, arm, seed), self.out, self.plan.steps) for arm in self.plan.arms
        }
        return measure_seconds(self.plan, configs, self.plan_path, self.out / "timing")

    def run_cells(self, *, workers: int, train_only: bool) -> list[Cell]:
        """Run all cells, `workers` at a time; returns those that failed, whose output is in their cell.log."""
        self.record_worlds()
        budgets = self.checked_budgets()
        known = known_cells(self.plan, budgets, self.merge)
        waiting = [c for c in budgets if str(c) not in known and not self.is_done(c, budgets[c], train_only)]
        total = sum(max(steps.values()) for steps in budgets.values())
        done = total - sum(max(budgets[cell].values()) for cell in waiting)
        failed: list[Cell] = []
        running: list[Running] = []
        with Progress("study", total, "step", done=done + sum(map(self.steps_done, waiting))) as bar, stopped(running):
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    running.append(Running(cell, self.start(cell, train_only)))
                time.sleep(POLL)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    if each.process.returncode:
                        failed.append(each.cell)
                    done += max(budgets[each.cell].values())
                    log = self.log_path(each.cell)
                    outcome = f"failed: {last_line(log)} ({log})" if each.process.returncode else "done"
                    bar.say(f"{each.cell}: {outcome}; {len(waiting) + len(running)} of {len(budgets)} cells left")
                under_way = sum(self.steps_done(each.cell) for each in running) + sum(map(self.steps_done, waiting))
                bar.update(max(0, done + under_way - bar.done))
        return failed

    def budgets(self) -> dict[Cell, dict[str, int]]:
        """The steps of each column of every cell; seeds do not change them."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for cell in self.plan.cells():
            if (cell.world, cell.arm) not in found:
                found[cell.world, cell.arm] = budgets_of(self.plan, cell, self.out, self.plan_path)
        return {cell: found[cell.world, cell.arm] for cell in self.plan.cells()}

    def checked_budgets(self) -> dict[Cell, dict[str, int]]:
        """`budgets`, after a check that the worlds give the endpoint, and that what is done is of this plan."""
        for name, world in self.plan.worlds.items():
            check_world(name, world, world_path(self.out, name))
        measured, budgets = check_endpoint(self.plan, self.out), self.budgets()
        for cell, of_cell in budgets.items():
            check_done(self.plan, cell, self.out, of_cell, measured[cell.world, cell.seed])
        return budgets

    def write(self) -> Path:
        """Write results.json and index.html from the cells that are evaluated; returns the page's path."""
        budgets = self.checked_budgets()
        results = Results(write_results(self.plan, self.plan_path, self.out, budgets, self.merge))
        return write_page(self.plan, results, self.out, rollout_pictures(self.plan, results, self.out))

    def is_done(self, cell: Cell, budgets: dict[str, int], train_only: bool) -> bool:
        places = [snapshot_path(self.out, cell, steps) for steps in budgets.values()]
        return all((place if train_only else place / "metrics.json").exists() for place in places)

    def steps_done(self, cell: Cell) -> int:
        return Checkpoints(self.out / cell.folder / "run" / "checkpoints").latest() or 0

    def log_path(self, cell: Cell) -> Path:
        return self.out / cell.folder / "cell.log"

    def start(self, cell: Cell, train_only: bool) -> subprocess.Popen[bytes]:
        (self.out / cell.folder).mkdir(parents=True, exist_ok=True)
        threads = str(self.plan.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "mfwm.study.cell", str(os.getpid()), str(self.plan_path), str(self.out)]
        command += [cell.world, cell.arm, str(cell.seed), *(["train"] if train_only else [])]
        with open(self.log_path(cell), "ab") as log:
            # A session of its own, so that Ctrl-C reaches it once, from here.
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def description_path(place: Path) -> Path:
    """Where the arguments that a world was recorded with are kept, beside it."""
    return place.parent / f"{place.name}.json"


def check_world(name: str, world: World, place: Path) -> None:
    """ValueError where a recorded world is not what the plan describes, which was edited then."""
    given, replay = json.loads(json.dumps(dataclasses.asdict(world))), recorded(place)
    known: dict[str, Any] = {"frames": replay.frames, "size": replay.frame[1]}
    known |= {key: replay.attributes[key] for key in ("env", "seed")}
    path = description_path(place)
    if path.is_file():
        described = parsed(path.read_bytes(), str(path))
        known |= {key: described.get(key) for key in world.collect_arguments()}
    for key, value in known.items():
        if given[key] != value:
            raise ValueError(
                f"worlds.{name}.{key} is {given[key]!r}, but the world in {place} was recorded with {value!r}; "
                "choose another --out"
            )


def last_line(log: Path) -> str:
    """The reason why a cell failed: the last line of its output."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


@contextmanager
def stopped(running: list[Running]) -> Iterator[None]:
    """Stop the cells that are still running at the end; they save a checkpoint and can be resumed."""

    def interrupt(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            try:
                each.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                each.process.kill()
        signal.signal(signal.SIGTERM, before)


def study(plan_path: Path, out: Path, *, workers: int, train_only: bool = False, merge: tuple[Path, ...] = ()) -> None:
    """Run a plan in `out`, but for the cells that the results files in `merge` hold.

    RuntimeError names the cells that failed, once all others are done.
    """
    check.integer("workers", workers, least=1)
    found = Study(plan_path, out, merge)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        failed = found.run_cells(workers=workers, train_only=train_only)
        if not train_only:
            print(f"study: {found.write()}")
    if failed:
        raise RuntimeError(f"{len(failed)} cells failed: {', '.join(map(str, failed))}")


def report(plan_path: Path, out: Path, merge: tuple[Path, ...] = ()) -> Path:
    """Write results.json and the page from the cells that are done, also while a study runs in `out`."""
    return Study(plan_path, out, merge).write()


def time_arms(plan_path: Path, out: Path) -> dict[str, float]:
    """Measure the seconds of a step of each arm, for the column of equal time, and write them beside the plan."""
    found = Study(plan_path, out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        return found.time_arms()
