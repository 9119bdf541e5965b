"""mfwm study: the plan, cells that resume, statistics, and the page."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mfwm.study.plan import Cell, merged, read_plan
from mfwm.study.results import Results, rounded
from mfwm.study.statistics import difference, holm, seeds_needed
from mfwm.study.timing import measure_seconds, read_seconds, seconds_path
from small_run import moving_squares, small_config

PLAN = """
title = "A small study"
seeds = [0, 1]
steps = 6
compute = "cascade"
clips = 4
predictions = ["Nothing can be learned in six steps."]

[endpoint]
arm = "cascade"
against = "noise"
steps = [2, 4]

[worlds.balls]
env = "balls"
frames = 1200
size = 16
balls = { count = 2, speed = 0.05 }

[train]
batch = 2
clip = 10
dtype = "float32"
tensorboard = false
look_every = 0
schedule = "constant"
warmup = 2
ema = 0.9
held_out = 0.2

[train.model]
patch = 4
width = 16
layers = 1
head_width = 8
context = 6

[arms.noise]
title = "next frame + context noise"
train = { context_noise = 0.2, model.heads.horizons = { offsets = [1], factors = [1] } }

[arms.cascade]
title = "cascade"
train = { model.heads = { horizons = { offsets = [1, 2, 4], factors = [1, 2, 4] }, patch_sizes = [4, 4, 2] } }
"""


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_a_plan_gives_each_cell_its_config(plan_path: Path) -> None:
    plan = read_plan(plan_path)
    assert plan.cells()[:3] == [Cell("balls", "noise", 0), Cell("balls", "cascade", 0), Cell("balls", "noise", 1)]
    noise, cascade = plan.training_config("noise"), plan.training_config("cascade")
    assert noise.context_noise == 0.2 and noise.model.noise_condition and not cascade.model.noise_condition
    assert cascade.model.heads.horizons.offsets == (1, 2, 4) and cascade.model.width == noise.model.width == 16
    # Options that an arm does not name are those of [train], and then the defaults.
    assert (noise.batch, noise.ema, noise.weight_decay) == (2, 0.9, 0.01)
    assert plan.worlds["balls"].collect_arguments()["balls"].count == 2


def test_the_other_columns_give_an_arm_what_the_named_one_costs(plan_path: Path) -> None:
    plan = read_plan(plan_path)
    costs = {"flops": {"noise": 2.0, "cascade": 3.0}, "time": {"noise": 4.0, "cascade": 3.0}}
    assert plan.budgets("noise", costs) == {"steps": 6, "flops": 9, "time": 4}
    assert plan.budgets("cascade", costs) == {"steps": 6, "flops": 6, "time": 6}


def test_arms_and_worlds_may_be_restricted(plan_path: Path) -> None:
    text = PLAN.replace('title = "cascade"', 'title = "cascade"\nworlds = ["balls"]')
    moon = '[worlds.moon]\nenv = "balls"\nframes = 100\nseeds = [1]\n'
    plan_path.write_text(text.replace("[train]\n", moon + "\n[train]\n", 1))
    assert [str(cell) for cell in read_plan(plan_path).cells()] == [
        "balls/noise/0", "balls/cascade/0", "balls/noise/1", "balls/cascade/1", "moon/noise/1",
    ]  # fmt: skip
    plan_path.write_text(text.replace("[train]\n", moon + 'arms = ["cascade"]\n\n[train]\n', 1))
    assert not [cell for cell in read_plan(plan_path).cells() if cell.world == "moon"]


def test_arms_that_were_timed_keep_their_seconds(plan_path: Path, tmp_path: Path) -> None:
    plan, path = read_plan(plan_path), seconds_path(plan_path)
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    path.write_text(json.dumps({"seconds": {"noise": 1000.0}}))
    with pytest.raises(ValueError, match="time the plan again"):
        read_seconds(plan, plan_path)
    configs = {"noise": small, "cascade": replace(small, rollout_loss=4)}
    measure_seconds(plan, configs, plan_path, tmp_path / "scratch")
    seconds = read_seconds(plan, plan_path)
    assert seconds is not None and seconds["noise"] == 1000.0
    # Four passes in place of one, in units of the arm that was timed before.
    assert 1500 < seconds["cascade"] < 8000


@pytest.mark.parametrize(
    "old, new, rule",
    (
        ("steps = 6", "steps = 0", "steps must be >= 1"),
        ('compute = "cascade"', 'compute = "B4"', "compute must name an arm of noise, cascade"),
        ('against = "noise"', 'against = "none"', "endpoint.against must name an arm"),
        ("steps = [2, 4]", "steps = [4, 2]", "endpoint.steps must be"),
        ("steps = [2, 4]", 'measure = "looks"', "endpoint.measure must be one of"),
        ("batch = 2", "steps = 9", "must not set steps"),
        ("batch = 2", "batches = 2", "batches"),
        ("[worlds.balls]", "[worlds.'a b']", "names of worlds and arms"),
        ('title = "cascade"', 'title = "cascade"\nworlds = ["moon"]', "must name worlds of balls"),
        ("seeds = [0, 1]", "seeds = []", "must not be empty"),
        ("title =", "title ==", "must hold TOML"),
    ),
)
def test_malformed_plans_are_named(plan_path: Path, old: str, new: str, rule: str) -> None:
    assert old in PLAN
    plan_path.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ValueError, match=rule) as raised:
        read_plan(plan_path)
    assert "plan.toml" in str(raised.value) or "arms." in str(raised.value)


def test_merging_goes_table_by_table() -> None:
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert merged(tree, {"b": {"d": {"e": 4}}}) == {"a": 1, "b": {"c": 2, "d": {"e": 4}}}
    assert tree["b"]["d"]["e"] == 3  # type: ignore[index]


def test_the_interval_of_a_difference_covers_it() -> None:
    """In about 95 of 100 studies whose seeds and clips both vary."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        a = 1.0 + rng.normal(0, 0.3, (8, 1)) + rng.normal(0, 1, (8, 20))
        found = difference(a, np.zeros((8, 20)))
        hits += found.low <= 1.0 <= found.high
    assert 50 <= hits <= 60
    assert difference(np.ones((3, 4)), np.zeros((3, 4))).mean == 1.0


def test_differences_are_paired() -> None:
    """A difference of 0.1 in every clip is certain, however much seeds and clips differ."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 5, (4, 1)) + rng.normal(0, 5, (4, 10))
    found = difference(base + 0.1, base)
    assert found.low == pytest.approx(0.1) == found.high and found.significant and found.p < 0.001


def test_holm_and_the_number_of_seeds() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    # Seeds that differ by 1, for a difference of 1: (1.96 + 0.84)^2 = 7.84.
    assert seeds_needed(np.array([-1.0, 0.0, 1.0]), 1.0) == 8


def test_figures_of_results() -> None:
    cells = {
        f"balls/{arm}/{seed}": {"steps": {"clips": [value + seed, value], "gain": [1.0, -1.0], "at": 6}}
        for arm, value in (("a", 1.0), ("b", 3.0))
        for seed in (0, 1)
    }
    del cells["balls/b/1"]
    results = Results({"cells": cells})
    assert results.worlds() == ["balls"] and results.arms("balls") == ["a", "b"] and results.columns() == ["steps"]
    assert results.seeds("balls", "a", "b") == [0] and results.values("balls", "a", "clips").shape == (2, 2)
    found = results.difference("balls", "b", "a")
    assert found is not None and found.mean == 2.0 and found.seeds == 1
    assert rounded({"a": [1.23456789, None, 3]}) == {"a": [1.2346, None, 3]}


def command(plan_path: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "mfwm.cli", "study", str(plan_path), "--out", str(out), "--workers", "2", *options]


@pytest.mark.process
@pytest.mark.slow
def test_a_study_killed_ten_times_ends_with_the_same_results(plan_path: Path, tmp_path: Path) -> None:
    """Killed without warning, its cells too or not, at random moments."""
    plan_path.write_text(PLAN.replace("seeds = [0, 1]", "seeds = [0]"))
    shutil.copy(plan_path, other := tmp_path / "other.toml")
    subprocess.run(command(plan_path, tmp_path / "whole"), check=True, capture_output=True, timeout=600)
    whole = (tmp_path / "whole" / "results.json").read_bytes()
    cells = json.loads(whole)["cells"]
    assert len(cells) == 2 and all(len(cell["steps"]["clips"]) == 4 for cell in cells.values())

    rng, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen(
            command(other, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(2, 7))
            break
        except subprocess.TimeoutExpired:
            kill(process, cells_too=kills % 2 == 0)
            kills += 1
    assert kills > 2
    subprocess.run(command(other, tmp_path / "killed"), check=True, capture_output=True, timeout=600)
    assert (tmp_path / "killed" / "results.json").read_bytes() == whole
    page = (tmp_path / "killed" / "index.html").read_text()
    assert "Nothing can be learned in six steps." in page and page.count("<img") == 2


def kill(process: subprocess.Popen[bytes], *, cells_too: bool) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for child in children if cells_too else ():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.1)
