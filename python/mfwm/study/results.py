"""What the cells of a study came to, in one JSON file from which every table, plot and sentence is computed.

Each cell has an entry for each column (equal steps, FLOPs and time): the number of steps, curves over rollout steps,
single figures, and for each clip the mean of the endpoint's measure over the endpoint's steps. An identity beside it
tells whether another file's cell of the same name was trained and measured in the same way, so that a study may be run
on several machines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.intervals import mean_of_defined
from ..metrics.quality import psnr
from ..training.checkpoints import write_atomically
from ..training.json_values import as_json
from ..training.run_config import parsed
from .cell import snapshot_path
from .plan import BUDGETS, Cell, Endpoint, Plan, World, merged
from .statistics import Difference, difference

NAME = "results.json"
# Of metrics.json: a value per rollout step, and single values or small tables.
CURVES = ("gain", "position_error", "rollout_psnr", "rollout_ssim")
FIGURES = ("psnr", "gain_zero_step", "action_ratio", "delta_psnr", "probe", "drift", "reader_error", "parameters")
# Digits that are kept: the clips of a hundred cells are most of the file.
DIGITS = 5


def entry(snapshot: Path, steps: int, endpoint: Endpoint) -> dict[str, Any]:
    """The figures of one evaluated snapshot."""
    metrics = parsed((snapshot / "metrics.json").read_bytes(), str(snapshot / "metrics.json"))
    found: dict[str, Any] = {"at": steps}
    found |= {name: rounded(metrics[name]) for name in (*CURVES, *FIGURES) if name in metrics}
    with np.load(snapshot / "clips.npz") as clips:
        values = measured(clips, endpoint.measure)
    first, last = endpoint.steps
    if values.shape[1] < last:
        raise ValueError(
            f"endpoint.steps must end within the {values.shape[1]} steps of the rollouts of {snapshot}, got {last}"
        )
    found["clips"] = rounded(mean_of_defined(values[:, first - 1 : last]).tolist())
    return found


def measured(clips: Mapping[str, np.ndarray], measure: str) -> np.ndarray:
    """[clips, steps]: a measure of an endpoint. The gain is that of each clip, with its own better baseline."""
    if measure != "gain":
        return clips[measure]
    baselines = np.minimum(clips["persistence_rollout_mse"], clips["mean_image_rollout_mse"])
    return psnr(clips["rollout_mse"]) - psnr(baselines)


def rounded(value: Any) -> Any:
    """The value with its floats cut to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def identity(plan: Plan, cell: Cell, budgets: Mapping[str, int]) -> str:
    """A digest of all that a plan says of a cell: world, options, steps and measures.

    What the plan leaves to defaults is left out, so options that mfwm gains later do not change it.
    """
    world = plan.worlds[cell.world].collect_arguments()
    defaults = {f.name: f.default for f in dataclasses.fields(World)}
    of_cell = {
        "world": {name: value for name, value in world.items() if value != defaults[name]},
        "train": merged(plan.train, plan.arms[cell.arm].train),
        "seed": cell.seed,
        "budgets": dict(budgets),
        "clips": plan.clips,
        "endpoint": [plan.endpoint.measure, plan.endpoint.steps],
    }
    return digest(json.dumps(of_cell, sort_keys=True, default=dataclasses.asdict).encode())


def known_cells(plan: Plan, budgets: Mapping[Cell, Mapping[str, int]], paths: Iterable[Path]) -> dict[str, Any]:
    """The plan's cells that other results files hold, by name. ValueError for a cell of another plan."""
    found: dict[str, Any] = {}
    for path in paths:
        results = read_results(path)
        identities = results.get("identities", {})
        for cell, of_cell in budgets.items():
            name = str(cell)
            if name not in results["cells"]:
                continue
            if identities.get(name) != identity(plan, cell, of_cell):
                raise ValueError(
                    f"{path} holds {name} of another plan: its world, options, steps, clips or endpoint differ"
                )
            found.setdefault(name, results["cells"][name])
    return found


def write_results(
    plan: Plan, plan_path: Path, out: Path, budgets: dict[Cell, dict[str, int]], merge: Iterable[Path] = ()
) -> dict[str, Any]:
    """Write results.json with all cells that are evaluated here or are in other results files; returns its contents.

    A cell that both have is the one that was evaluated here.
    """
    cells, identities, known = {}, {}, known_cells(plan, budgets, merge)
    for cell, of_cell in budgets.items():
        columns = {
            column: entry(snapshot, steps, plan.endpoint)
            for column, steps in of_cell.items()
            if ((snapshot := snapshot_path(out, cell, steps)) / "metrics.json").is_file()
        }
        if len(columns) < len(of_cell):
            columns = known.get(str(cell), {})
        if columns:
            cells[str(cell)], identities[str(cell)] = columns, identity(plan, cell, of_cell)
    results = {
        "title": plan.title,
        "plan": digest(Path(plan_path).read_bytes()),
        "identities": identities,
        "cells": cells,
    }
    write_atomically(out / NAME, as_json(results, indent=1).encode())
    return results


def read_results(path: Path) -> dict[str, Any]:
    results = parsed(Path(path).read_bytes(), str(path))
    if not isinstance(results.get("cells"), dict):
        raise ValueError(f"{path} must hold the cells of a study, got {', '.join(results)}")
    return results


class Results:
    """Figures of results.json by world, arm, seed and column."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.cells: dict[tuple[str, str, int], dict[str, Any]] = {}
        for name, columns in results["cells"].items():
            world, arm, seed = name.split("/")
            self.cells[world, arm, int(seed)] = columns

    def worlds(self) -> list[str]:
        return list(dict.fromkeys(world for world, _, _ in self.cells))

    def arms(self, world: str) -> list[str]:
        return list(dict.fromkeys(arm for its_world, arm, _ in self.cells if its_world == world))

    def columns(self) -> list[str]:
        return [column for column in BUDGETS if all(column in columns for columns in self.cells.values())]

    def seeds(self, world: str, *arms: str) -> list[int]:
        """The seeds that all of these arms have."""
        seeds = [{s for w, a, s in self.cells if (w, a) == (world, arm)} for arm in arms]
        return sorted(set.intersection(*seeds))

    def values(
        self, world: str, arm: str, name: str, column: str = "steps", seeds: list[int] | None = None
    ) -> np.ndarray:
        """[seeds, ...]: a figure or curve of an arm, for each of its seeds.

        Undefined values are NaN, and so are the last ones of seeds that have fewer clips or steps than others.
        """
        chosen = self.seeds(world, arm) if seeds is None else seeds
        rows = [np.array(self.cells[world, arm, seed][column][name], np.float64) for seed in chosen]
        if rows and rows[0].ndim == 1:
            longest = max(map(len, rows))
            rows = [np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows]
        return np.array(rows)

    def difference(self, world: str, arm: str, against: str, column: str = "steps") -> Difference | None:
        """The endpoint of `arm` minus that of `against`, paired by seed and clip; None where no clip has both."""
        seeds = self.seeds(world, arm, against)
        if not seeds:
            return None
        return difference(*(self.values(world, name, "clips", column, seeds) for name in (arm, against)))


def load(path: Path) -> Results:
    return Results(read_results(path))
