"""The plan of a study: what is trained, on which worlds, how often, and what was expected of it.

A plan is a TOML file:

    title = "Does it help?"
    seeds = [0, 1, 2, 3, 4]
    steps = 1000
    compute = "cascade"
    predictions = ["The cascade beats context noise after step 8."]

    [endpoint]
    arm = "cascade"
    against = "noise"
    measure = "position_error"
    steps = [9, 32]

    [worlds.balls]
    env = "balls"
    frames = 60000
    size = 32

    [train]
    batch = 8
    model.width = 128

    [arms.noise]
    title = "next frame + context noise"
    train.context_noise = 0.2
    train.model.heads.horizons = { offsets = [1], factors = [1] }

A cell is one training run: an arm on a world with a seed. Options in [train] are those of `mfwm train`, for all arms;
those of an arm replace them.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfwm_kernels import arguments as check

from ..data.collect import Balls, checked_source
from ..evaluation.closed_loop import can_roll_out
from ..training.run_config import from_tree
from ..training.world_model import TrainingConfig

# Three columns of results: as many steps, as many FLOPs, and as much time as the arm `compute` takes.
BUDGETS = ("steps", "flops", "time")
# Measures of an endpoint, and whether more of it is better.
MEASURES = {"position_error": False, "rollout_mse": False, "gain": True}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
# Options that choose the clips of an evaluation, which must be those of all arms.
OF_ALL_ARMS = ("clip", "held_out")
# Set for each cell, so no plan gives them.
OF_CELLS = ("data", "steps", "seed")


@dataclass(frozen=True)
class World:
    """What to record, with the arguments of `mfwm collect`."""

    env: str
    frames: int
    size: int = 64
    title: str = ""
    seed: int = 0
    frame_skip: int = 1
    field: bool = False
    balls: Balls | None = None
    arms: tuple[str, ...] | None = None
    """The arms that are trained on this world; None: all."""
    seeds: tuple[int, ...] | None = None
    """The seeds on this world, among those of the plan; None: all."""

    def __post_init__(self) -> None:
        checked_source(**self.collect_arguments())

    def collect_arguments(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("title", "arms", "seeds")]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Arm:
    """One way to train: a title for tables, and options of `mfwm train`."""

    title: str
    train: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[str, ...] | None = None
    """The worlds that this arm is trained on; None: all."""
    seeds: tuple[int, ...] | None = None
    """The seeds of this arm, among those of the plan; None: all."""


@dataclass(frozen=True)
class Endpoint:
    """The one comparison that the study is for: `arm` against `against`, in `measure`, the mean over rollout steps."""

    arm: str
    against: str
    measure: str = "position_error"
    steps: tuple[int, int] = (9, 32)

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"endpoint.measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"endpoint.steps must be [first, last] with 1 <= first <= last, got {list(self.steps)}")


@dataclass(frozen=True)
class Cell:
    world: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the cell is kept, within the study's directory."""
        return Path("cells") / self.world / self.arm / str(self.seed)

    def __str__(self) -> str:
        return f"{self.world}/{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The contents of a plan file.

    steps: optimiser steps of every arm in the column of equal steps.
    compute: the arm whose FLOPs and time the others get in the other two columns.
    threads: CPU threads of a cell.
    clips: held-out clips to evaluate on.
    predictions: what was expected before the first run.
    """

    title: str
    steps: int
    compute: str
    endpoint: Endpoint
    worlds: dict[str, World]
    arms: dict[str, Arm]
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    threads: int = 1
    clips: int = 64
    predictions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "threads", "clips"):
            check.integer(name, getattr(self, name), least=1)
        if not (self.worlds and self.arms and self.seeds):
            raise ValueError("worlds, arms and seeds must not be empty")
        for name in (*self.worlds, *self.arms):
            if not NAME.fullmatch(name):
                raise ValueError(f"names of worlds and arms must be letters, digits and + . _ -, got {name!r}")
        roles = {"compute": self.compute, "endpoint.arm": self.endpoint.arm, "endpoint.against": self.endpoint.against}
        for role, named in roles.items():
            if named not in self.arms:
                raise ValueError(f"{role} must name an arm of {', '.join(self.arms)}, got {named!r}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers >= 0, got {list(self.seeds)}")
        for name, arm in self.arms.items():
            check_some(f"arms.{name}.worlds", arm.worlds, "worlds", self.worlds)
            check_some(f"arms.{name}.seeds", arm.seeds, "seeds", self.seeds)
        for name, world in self.worlds.items():
            check_some(f"worlds.{name}.arms", world.arms, "arms", self.arms)
            check_some(f"worlds.{name}.seeds", world.seeds, "seeds", self.seeds)
        self._check_training()

    def _check_training(self) -> None:
        """ValueError for options of training by which cells could not be compared."""
        configs = {name: self.training_config(name) for name in self.arms}
        first, like = next(iter(configs.items()))
        for name, config in configs.items():
            if config.schedule != "constant":
                raise ValueError(
                    f'arms.{name}: schedule must be "constant", because the columns of a cell are taken from one run, '
                    f"and where it is longer, another schedule would be under way; got {config.schedule!r}"
                )
            if not can_roll_out(config.model):
                raise ValueError(
                    f"arms.{name}: a study compares rollouts, which need a near horizon of offset 1 and factor 1; got "
                    f"{config.model.heads.horizons}"
                )
            for option in OF_ALL_ARMS:
                mine, others = getattr(config, option), getattr(like, option)
                if mine != others:
                    raise ValueError(
                        f"arms.{name}: {option} must be that of arms.{first}, {others}, because it chooses the clips "
                        f"that both are evaluated on; got {mine}"
                    )

    def cells(self) -> list[Cell]:
        """All cells: every arm of a world and seed before the next seed, so that a study that stops early is paired.

        Arms that name their worlds, and worlds that name their arms, come last: they are variants of the others.
        """

        def variant(cell: Cell) -> bool:
            return self.arms[cell.arm].worlds is not None or self.worlds[cell.world].arms is not None

        cells = [
            Cell(place, name, seed)
            for seed in self.seeds
            for place, world in self.worlds.items()
            for name, arm in self.arms.items()
            if place in (arm.worlds or self.worlds)
            and name in (world.arms or self.arms)
            and seed in (arm.seeds or self.seeds)
            and seed in (world.seeds or self.seeds)
        ]
        return sorted(cells, key=variant)

    def training_config(self, arm: str) -> TrainingConfig:
        """How an arm is trained, but for the data, the seed and the frames."""
        default = TrainingConfig(data="")
        tree = dataclasses.asdict(default)
        for place, options in (("train", self.train), (f"arms.{arm}.train", self.arms[arm].train)):
            if fixed := [name for name in OF_CELLS if name in options]:
                raise ValueError(f"{place} must not set {', '.join(fixed)}, which the study sets for each cell")
            tree = merged(tree, options)
        return from_tree(TrainingConfig, {**tree, "steps": self.steps}, f"arms.{arm}.train")

    def budgets(self, arm: str, costs: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
        """The steps that an arm gets in each column. costs: by column, "flops" or "time", each arm's cost of a step."""
        found = {"steps": self.steps}
        for column, cost in costs.items():
            found[column] = max(1, round(self.steps * cost[self.compute] / cost[arm]))
        return found


def check_some(name: str, chosen: tuple[Any, ...] | None, kind: str, among: Iterable[Any]) -> None:
    """ValueError unless some of what there is is chosen, each once, or all by None."""
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(among)):
        raise ValueError(f"{name} must name {kind} of {', '.join(map(str, among))}, each once; got {list(chosen)}")


def merged(tree: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with values replaced by those of `options`, table by table."""
    found = dict(tree)
    for name, value in options.items():
        inner = found.get(name)
        found[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return found


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file. ValueError names file, rule and value where it is not valid."""
    try:
        tree = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must hold TOML: {error}") from error
    for name, kind in (("worlds", World), ("arms", Arm)):
        tables = tree.get(name)
        if not isinstance(tables, dict):
            raise ValueError(f"{path} needs a table {name}.NAME for each of its {name}, got {tables!r}")
        tree[name] = {key: from_tree(kind, table, f"{path}: {name}.{key}") for key, table in tables.items()}  # type: ignore[type-var]
    return from_tree(Plan, tree, str(path))
