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
from mfwm.data.replay_writer import ReplayWriter
from mfwm.study.cell import BESIDE, snapshot_path, train_cell
from mfwm.study.plan import Cell, merged, read_plan
from mfwm.study.results import Results, measured, rounded
from mfwm.study.runner import Study, report, study
from mfwm.study.statistics import difference, holm, seeds_needed
from mfwm.study.timing import measure_seconds, read_seconds, seconds_path
from mfwm.training.run_lock import locked
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


def test_the_further_plan_is_the_core_with_a_term_for_each_arm() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "study"
    core, further = read_plan(folder / "core.toml"), read_plan(folder / "further.toml")
    assert further.worlds["balls"] == core.worlds["balls"] and further.endpoint.steps == core.endpoint.steps
    cascade = core.training_config("B4")
    assert further.training_config("B4") == cascade
    terms = {"B7": {"latent_consistency": 0.1}, "B9": {"temporal_difference": 0.5}, "B10": {"contrast": 0.1}}
    assert {*terms, "B4"} == set(further.arms)
    for arm, options in terms.items():
        heads = replace(cascade.model.heads, **options)  # type: ignore[arg-type]
        assert further.training_config(arm) == replace(cascade, model=replace(cascade.model, heads=heads))


def test_the_plan_of_sizes_takes_cells_of_the_core() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "study"
    core, sizes = read_plan(folder / "core.toml"), read_plan(folder / "sizes.toml")
    assert sizes.worlds == {name: core.worlds[name] for name in ("balls", "freeway")}
    seconds = [read_seconds(plan, folder / name) for plan, name in ((core, "core.toml"), (sizes, "sizes.toml"))]
    for cell in sizes.cells():
        if cell.arm in core.arms:
            assert cell in core.cells() and sizes.training_config(cell.arm) == core.training_config(cell.arm)
            assert seconds[0] and seconds[1] and seconds[0][cell.arm] == seconds[1][cell.arm]
    assert {"A0", "B3", "B4"} < set(sizes.arms) and sizes.steps == core.steps


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
        "balls/noise/0", "balls/noise/1", "moon/noise/1", "balls/cascade/0", "balls/cascade/1",
    ]  # fmt: skip
    plan_path.write_text(text.replace("[train]\n", moon + 'arms = ["cascade"]\n\n[train]\n', 1))
    assert not [cell for cell in read_plan(plan_path).cells() if cell.world == "moon"]


def test_arms_that_were_timed_keep_their_seconds(plan_path: Path, tmp_path: Path) -> None:
    plan, path = read_plan(plan_path), seconds_path(plan_path)
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    path.write_text(json.dumps({"seconds": {"noise": 1000.0}, "device": "another CPU"}))
    with pytest.raises(ValueError, match="time the plan again"):
        read_seconds(plan, plan_path)
    configs = {"noise": small, "cascade": replace(small, rollout_loss=4)}
    measure_seconds(plan, configs, plan_path, tmp_path / "scratch")
    seconds = read_seconds(plan, plan_path)
    assert seconds is not None and seconds["noise"] == 1000.0
    assert json.loads(path.read_text())["device"] == "another CPU"
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
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must be different numbers"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds must be different numbers"),
        ('title = "cascade"', 'title = "cascade"\nworlds = []', "arms.cascade.worlds must name worlds"),
        ('title = "cascade"', 'title = "cascade"\nseeds = [7]', "arms.cascade.seeds must name seeds of 0, 1"),
        ("size = 16", "size = 16\narms = []", "worlds.balls.arms must name arms"),
        ("size = 16", "size = 16\nseeds = [0, 0]", "worlds.balls.seeds must name seeds"),
        ('env = "balls"', 'env = "marbles"', "worlds.balls: env must be one of"),
        ("frames = 1200", "frames = 0", "worlds.balls: frames must be >= 1"),
        # The columns of a cell are snapshots of one run.
        ('schedule = "constant"', 'schedule = "cosine"', "schedule must be"),
        # Arms are paired by clip.
        ("context_noise = 0.2", "context_noise = 0.2, held_out = 0.3", "held_out must be that of arms.noise"),
        ("context_noise = 0.2", "context_noise = 0.2, clip = 12", "clip must be that of arms.noise"),
        ("offsets = [1], factors", "offsets = [2], factors", "a study compares rollouts"),
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


def test_differences_of_seeds_with_fewer_clips() -> None:
    """Seeds weigh the same. Clips without a value, and seeds without any, are left out."""
    nan = np.nan
    values = np.array([[1.0, 1.0, 1.0, 1.0], [nan, 3.0, nan, nan], [nan, nan, nan, nan]])
    found = difference(values, np.zeros((3, 4)))
    assert found is not None and (found.mean, found.seeds, found.low, found.high) == (2.0, 2, 1.0, 3.0)
    # Both seeds, one of them, or the other: a quarter of the resamples are all 1.
    assert difference(values[2:], np.zeros((1, 4))) is None
    cells = {f"balls/a/{seed}": {"steps": {"clips": clips}} for seed, clips in enumerate(([1.0, 2.0], [3.0], [None]))}
    padded = Results({"cells": cells}).values("balls", "a", "clips")
    assert np.array_equal(padded, [[1.0, 2.0], [3.0, nan], [nan, nan]], equal_nan=True)


def test_the_interval_is_that_of_a_bootstrap_written_out() -> None:
    rng = np.random.default_rng(2)
    values, means = rng.normal(0.4, 1.0, (3, 7)), []
    for _ in range(20000):
        seeds = rng.choice(3, 3)
        means.append(np.mean([rng.choice(values[seed], 7).mean() for seed in seeds]))
    found = difference(values, np.zeros((3, 7)))
    assert found is not None
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.03)
    assert found.p == pytest.approx(2 * min(np.mean(np.array(means) < 0), np.mean(np.array(means) > 0)), abs=0.03)


def test_the_gain_of_clips() -> None:
    """Over the better of the two baselines, clip by clip: 10 log10 of the ratio of errors."""
    clips = {
        "rollout_mse": np.array([[0.1, 0.2], [0.4, 0.1]]),
        "persistence_rollout_mse": np.array([[1.0, 0.2], [0.4, 0.01]]),
        "mean_image_rollout_mse": np.array([[2.0, 0.1], [4.0, 1.0]]),
    }
    expected = 10 * np.log10([[10.0, 0.5], [1.0, 0.1]])
    np.testing.assert_allclose(measured(clips, "gain"), expected, atol=1e-9)
    assert measured(clips, "rollout_mse") is clips["rollout_mse"]


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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plan.toml and `out`, where its cells of one seed are done, in a path with a space."""
    folder = tmp_path_factory.mktemp("a study")
    (folder / "plan.toml").write_text(PLAN.replace("seeds = [0, 1]", "seeds = [0]"))
    subprocess.run(command(folder / "plan.toml", folder / "out"), check=True, capture_output=True, timeout=600)
    return folder


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, rule",
    (
        ("frames = 1200", "frames = 1300", r"worlds.balls.frames is 1300, but .* was recorded with 1200"),
        ("speed = 0.05", "speed = 0.06", r"worlds.balls.balls is .*0.06.*, but .* was recorded with"),
        ("batch = 2", "batch = 4", r"batch is 4, but the run in .*cells/balls/noise/0/run was started with 2"),
        ("context_noise = 0.2", "context_noise = 0.1", "context_noise is 0.1, but the run in"),
        ("clips = 4", "clips = 3", "balls/noise/0 was evaluated with clips = 4, and not 3"),
        ("steps = [2, 4]", "steps = [2, 33]", "balls/noise/0 was evaluated with rollout_steps = 32, and not 33"),
        ("steps = [2, 4]", "steps = [2, 400]", "endpoint.steps must end by step"),
    ),
)
def test_a_plan_that_was_edited_is_not_mixed_with_its_cells(done: Path, old: str, new: str, rule: str) -> None:
    before = (done / "out" / "results.json").read_bytes()
    edited = done / "edited.toml"
    edited.write_text((done / "plan.toml").read_text().replace(old, new, 1))
    for call in (lambda: study(edited, done / "out", workers=1), lambda: report(edited, done / "out")):
        with pytest.raises(ValueError, match=rule):
            call()
    assert (done / "out" / "results.json").read_bytes() == before


@pytest.mark.process
@pytest.mark.slow
def test_a_partial_study_is_reported_while_another_one_runs(done: Path) -> None:
    """With the cells that are done, of a plan with more seeds and arms; by the gain, which no run has measured."""
    plan = done / "more.toml"
    more = (done / "plan.toml").read_text().replace("seeds = [0]", "seeds = [0, 1]")
    plan.write_text(more.replace("steps = [2, 4]", 'steps = [2, 4]\nmeasure = "gain"'))
    shutil.copytree(done / "out", done / "copy")
    with locked(done / "copy"):
        page = report(plan, done / "copy").read_text()
        with pytest.raises(BlockingIOError, match="is in use"):
            study(plan, done / "copy", workers=1)
    assert "2 of 4 cells" in page and "gain, dB, steps 2 to 4" in page
    cells = json.loads((done / "copy" / "results.json").read_text())["cells"]
    with np.load(done / "copy" / "cells/balls/noise/0/at-00000006/clips.npz") as clips:
        expected = measured(clips, "gain")[:, 1:4].mean(1)
    assert cells["balls/noise/0"]["steps"]["clips"] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.process
@pytest.mark.slow
def test_cells_of_another_machine_are_merged_and_not_run(done: Path, tmp_path: Path) -> None:
    """A plan that gained an arm runs that arm alone; cells of a plan that differs are refused by name."""
    known, plan = done / "out" / "results.json", tmp_path / "more.toml"
    text = (done / "plan.toml").read_text()
    plan.write_text(
        text + '\n[arms.plain]\ntitle = "plain"\ntrain.model.heads.horizons = { offsets = [1], factors = [1] }\n'
    )
    subprocess.run(command(plan, tmp_path / "out", "--merge", str(known)), check=True, capture_output=True, timeout=600)
    assert [place.name for place in (tmp_path / "out" / "cells" / "balls").iterdir()] == ["plain"]
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert list(cells) == ["balls/noise/0", "balls/cascade/0", "balls/plain/0"]
    before = json.loads(known.read_text())["cells"]
    assert all(cells[name] == columns for name, columns in before.items())
    assert "3 of 3 cells" in (page := (tmp_path / "out" / "index.html").read_text()) and "Rollouts" in page

    for old, new in (("context_noise = 0.2", "context_noise = 0.1"), ("clips = 4", "clips = 3"), ("0.05", "0.06")):
        assert old in text
        plan.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"holds balls/(noise|cascade)/0 of another plan"):
            study(plan, tmp_path / "empty", workers=1, merge=(known,))
        assert not (tmp_path / "empty" / "cells").exists()
        shutil.rmtree(tmp_path / "empty" / "worlds")


@pytest.mark.process
@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    """The others are done, in a world without positions and with episodes shorter than the pictures' rollouts."""
    text = PLAN.replace("seeds = [0, 1]", "seeds = [0]").replace(
        "steps = [2, 4]", 'steps = [2, 4]\nmeasure = "rollout_mse"'
    )
    (tmp_path / "plan.toml").write_text(text + '\n[arms.bad]\ntitle = "bad"\ntrain = { lr = 1e30, clip_norm = 1e30 }\n')
    world = tmp_path / "out" / "worlds" / "balls"
    world.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with ReplayWriter(world, 16, 16, actions=5, env="balls", seed=0) as writer:
        for level in range(60):
            writer.append(rng.integers(256, size=(20, 16, 16, 3), dtype=np.uint8), rng.integers(5, size=20), level)
    done = subprocess.run(
        command(tmp_path / "plan.toml", tmp_path / "out"), capture_output=True, text=True, timeout=600
    )
    told = done.stdout + done.stderr
    assert done.returncode and "1 cells failed: balls/bad/0" in told
    assert "balls/bad/0: failed: FloatingPointError: step " in told and "balls/bad/0: done" not in told
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert list(cells) == ["balls/noise/0", "balls/cascade/0"]
    assert "Rollouts" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(ValueError, match=r"endpoint.measure must be rollout_mse or gain with worlds.balls"):
        (tmp_path / "plan.toml").write_text(text.replace("rollout_mse", "position_error"))
        study(tmp_path / "plan.toml", tmp_path / "out", workers=1)


def test_a_study_needs_a_worker(plan_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be >= 1"):
        study(plan_path, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_copies_that_a_killed_cell_left_are_deleted(plan_path: Path, tmp_path: Path) -> None:
    plan, cell = read_plan(plan_path), Cell("balls", "noise", 0)
    Study(plan_path, tmp_path).record_worlds()
    left = tmp_path / cell.folder / f"{BESIDE}0" / "checkpoints"
    left.mkdir(parents=True)
    train_cell(plan, cell, tmp_path, {"steps": 2})
    assert not left.parent.exists() and snapshot_path(tmp_path, cell, 2).is_dir()
    # A column that was added when the run was past its step.
    with pytest.raises(ValueError, match="was trained past step 1 without keeping a checkpoint there"):
        train_cell(plan, cell, tmp_path, {"steps": 2, "time": 1})


def command(plan_path: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "mfwm.cli", "study", str(plan_path), "--out", str(out), "--workers", "2", *options]


@pytest.mark.process
@pytest.mark.slow
def test_a_study_killed_at_random_ends_with_the_same_results(done: Path, tmp_path: Path) -> None:
    """Killed without warning, its cells too or not. MFWM_STUDY_KILLS sets how often."""
    shutil.copy(done / "plan.toml", other := tmp_path / "other.toml")
    whole = (done / "out" / "results.json").read_bytes()
    cells = json.loads(whole)["cells"]
    assert len(cells) == 2 and all(len(cell["steps"]["clips"]) == 4 for cell in cells.values())

    rng, kills = random.Random(0), 0
    while kills < int(os.environ.get("MFWM_STUDY_KILLS", "4")):
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
