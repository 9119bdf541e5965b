"""A run knows its data set by what that holds, wherever it is; broken files of a run are named."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from mfwm import HeadsConfig
from mfwm.data import Replay
from mfwm.evaluation import write_report
from mfwm.evaluation.world_model import evaluate
from mfwm.training import TrainingConfig, train
from mfwm.training.data_identity import digest
from mfwm.training.json_values import as_json
from mfwm.training.run_config import read
from mfwm.training.run_log import Log, column, read_log
from mfwm.training.trainer import Trainer, TrainerConfig
from mfwm.training.world_model import load_config
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons


@pytest.fixture
def data(tmp_path: Path) -> Path:
    moving_squares(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def config(data: Path) -> TrainingConfig:
    return replace(small_config(data), steps=2, checkpoint_every=1)


def begun(config: TrainingConfig, run: Path) -> Path:
    train(config, run, progress=False, stop_after=1)
    return run


# ---- where the data set is


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "data", "./data", "../{name}/data", "link", "copy", "file://{}"])
def test_a_run_is_resumed_however_its_data_is_named(
    config: TrainingConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    run = begun(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    if spelling == "link":
        (tmp_path / "link").symlink_to(data)
    if spelling == "copy":
        shutil.copytree(data, tmp_path / "copy")
    train(replace(config, data=spelling.format(data, name=tmp_path.name)), run, progress=False)
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [0, 1]


def test_a_relative_path_is_found_from_elsewhere(
    config: TrainingConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun(replace(config, data="data"), tmp_path / "run")
    assert load_config(run).data == str(data)
    monkeypatch.chdir("/")
    assert evaluate(run, clips=2, progress=False)["clips"] == 2


def test_a_set_that_moved(config: TrainingConfig, data: Path, tmp_path: Path) -> None:
    run, other = begun(config, tmp_path / "run"), begun(replace(config, lr=0.01), tmp_path / "other")
    before = evaluate(run, clips=2, progress=False)["psnr"]
    far = tmp_path / "far" / "away"
    far.parent.mkdir()
    shutil.move(data, far)
    with pytest.raises(
        ValueError, match=r"the run's data set cannot be read .*/data does not exist.*give its new place as data"
    ):
        evaluate(run, clips=2, progress=False)
    found = evaluate(run, data=far, against=other, clips=2, progress=False)
    assert found["psnr"] == before and "against_gain_95" in found
    assert write_report(run, data=far).exists()
    # A resumed run is told where the set is, and so knows from then on.
    train(replace(config, data=str(far)), run, progress=False)
    assert load_config(run).data == str(far) and evaluate(run, clips=2, progress=False)["steps"] == 2


def test_a_set_with_a_new_name_is_found(config: TrainingConfig, data: Path, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    moving_squares(tmp_path / "another")
    zarr.open_group(str(tmp_path / "another"))["data/action"][3] += 1
    shutil.move(data, tmp_path / "renamed")
    with pytest.warns(UserWarning, match="data no longer exists; using .*renamed, which holds the same data set"):
        evaluate(run, clips=2, progress=False)


def change_action(data: Path) -> None:
    actions = zarr.open_group(str(data))["data/action"]
    actions[7] = (actions[7] + 1) % 4


def change_level(data: Path) -> None:
    zarr.open_group(str(data))["meta/episode_level"][0] = 99


def change_end(data: Path) -> None:
    zarr.open_group(str(data))["meta/episode_ends"][0] -= 1


def change_frames(data: Path) -> None:
    """As another game of the same length would: every one of them."""
    video = zarr.open_group(str(data))["data/img"]
    video[:] = 255 - video[:]


def change_actions(data: Path) -> None:
    zarr.open_group(str(data)).attrs["actions"] = 5


@pytest.mark.parametrize("change", [change_action, change_level, change_end, change_frames, change_actions])
def test_another_set_is_refused(
    config: TrainingConfig, data: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """In another place, and in the same."""
    run, sound = begun(config, tmp_path / "run"), digest(Replay(data))
    shutil.copytree(data, tmp_path / "other")
    assert digest(Replay(tmp_path / "other")) == sound
    change(tmp_path / "other")
    assert digest(Replay(tmp_path / "other")) != sound
    message = rf"data is {tmp_path}/other, but the run in .*/run was started with another data set, which was in {data}"
    with pytest.raises(ValueError, match=message):
        train(replace(config, data=str(tmp_path / "other")), run, progress=False)
    with pytest.raises(
        ValueError, match=r"data must be the set that the run was trained on, .*/other holds another one"
    ):
        evaluate(run, data=tmp_path / "other", progress=False)
    change(data)
    with pytest.raises(ValueError, match=r"data must be the set that the run was trained on"):
        evaluate(run, progress=False)
    with pytest.raises(ValueError, match=r"was started with another data set"):
        train(config, run, progress=False)


def test_runs_on_other_sets_are_not_compared(config: TrainingConfig, data: Path, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    shutil.copytree(data, tmp_path / "other")
    change_action(tmp_path / "other")
    other = begun(replace(config, data=str(tmp_path / "other")), tmp_path / "beside")
    with pytest.raises(ValueError, match=r"against must be a run on the same data set: its data is .*/other, not"):
        evaluate(run, against=other, progress=False)


def test_a_run_without_a_digest_goes_by_the_path(config: TrainingConfig, data: Path, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    tree = json.loads((run / "config.json").read_text())
    del tree["data_digest"]
    (run / "config.json").write_text(json.dumps(tree))
    shutil.copytree(data, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"data is .*/copy', but the run in .* was started with .*/data'"):
        train(replace(config, data=str(tmp_path / "copy")), run, progress=False)
    train(config, run, progress=False)
    assert read(TrainingConfig, run)[1] == digest(Replay(data))


def test_a_run_that_never_began_is_free(config: TrainingConfig, tmp_path: Path) -> None:
    """What was refused before its first step leaves no config that binds the next try."""
    with pytest.raises(ValueError, match="does not exist"):
        train(replace(config, data=str(tmp_path / "typo")), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="is more than all episodes together"):
        train(replace(config, clip=5000), tmp_path / "run", progress=False)
    train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="clip is 13, but the run"):
        train(replace(config, clip=13), tmp_path / "run", progress=False)


def test_a_sampler_of_ones_own_needs_no_replay_buffer(tmp_path: Path) -> None:
    for _ in range(2):
        with Trainer(TrainerConfig("streamed", steps=1), tmp_path / "run", progress=False) as trainer:
            assert trainer.config.data == "streamed"
            with pytest.raises(ValueError, match="streamed does not exist"):
                trainer.sampler()


# ---- broken files of a run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold JSON"),
        ("{", "must hold JSON"),
        ("[" * 100_000, "must hold JSON"),
        (b"\xff\xfe\x00", "must hold JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
        ("{}", "TrainingConfig needs data, which is missing"),
        ({"data": 3}, "data must be str, got 3"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": math.nan}, "lr must be finite, got nan"),
        ({"model": []}, r"model must be WorldModelConfig, got \[\]"),
        ({"model": {"frame": [3, 16]}}, r"frame must be .*tuple.*, got \[3, 16\]"),
        ({"model": {"frame": [3, "16", 16]}}, r"frame must be .*, got \[3, '16', 16\]"),
        ({"model": {"patch": 0}}, "patch must be >= 1, got 0"),
        ({"model": {"heads": {"detach": 5}}}, "detach must be .*near.*None.*, got 5"),
        ({"model": {"heads": {"horizons": {"offsets": [1]}}}}, "Horizons needs factors, which is missing"),
        ({"stepz": 3}, "TrainingConfig has no stepz"),
        ({"data_digest": 3}, "data_digest must be text, got 3"),
    ],
)
def test_a_broken_config_is_named(config: TrainingConfig, tmp_path: Path, content: Any, message: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if isinstance(content, dict):
        content = json.dumps({"data": "x", **content})
    (run / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"run/config\.json:? .*{message}"):
        load_config(run)
    with pytest.raises(ValueError, match=rf"run/config\.json:? .*{message}"):
        evaluate(run, progress=False)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is not a run directory: it has no config\.json"):
        evaluate(tmp_path / "nothing", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is not a run directory"):
        load_config(tmp_path / "file")


def test_every_config_comes_back(config: TrainingConfig, tmp_path: Path) -> None:
    heads = replace(config.model.heads, consistency=((0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.0, 0.0, 0.0)), detach=None)
    wanted = replace(config, lr=1, ema=0, model=replace(config.model, positions="rope", window=4, heads=heads))
    assert load_config(begun(wanted, tmp_path / "run")) == wanted


def test_a_broken_log_is_named_and_kept(config: TrainingConfig, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    log = run / "log.jsonl"
    (row,) = log.read_bytes().splitlines()
    log.write_bytes(row + b"\n" + row[:40])
    assert len(read_log(log)) == 1
    for content, message in (
        (b"\x00\x00\n" + row + b"\n", r"log\.jsonl, line 1 must be JSON"),
        (b"[1]\n" + row + b"\n", r"log\.jsonl, line 1 must be an object with the integer step"),
        (b'{"loss": 1}\n' + row + b"\n", r"log\.jsonl, line 1 must be an object with the integer step"),
    ):
        log.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train(config, run, progress=False)
        assert log.read_bytes() == content
    log.write_bytes(row.replace(b'"seconds"', b'"minutes"') + b"\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, step 0: seconds must be a number, got None"):
        evaluate(run, progress=False)
    log.write_bytes(b"")
    with pytest.raises(ValueError, match=r"log\.jsonl must have a row for each step"):
        evaluate(run, progress=False)
    log.unlink()
    with pytest.raises(ValueError, match=r"log\.jsonl is missing"):
        evaluate(run, progress=False)


def test_a_broken_metrics_file_is_named(config: TrainingConfig, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: evaluate the run first"):
        write_report(run)
    (run / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json must hold a JSON object, got list"):
        write_report(run)
    (run / "metrics.json").write_text('{"data": {}, "steps": 1}')
    with pytest.raises(ValueError, match=r"metrics\.json must hold what evaluate writes, but it lacks parameters, fr"):
        write_report(run)


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    values = {"a": [math.nan, 1.0, (math.inf, 2)], "b": {"c": -math.inf, "d": np.float64("nan")}}
    assert json.loads(as_json(values)) == {"a": [None, 1.0, [None, 2]], "b": {"c": None, "d": None}}
    log = Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 0, "per_horizon": [math.nan, 1.0]})
    log.close()
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0, "per_horizon": [None, 1.0]}]
    with pytest.raises(ValueError, match="step 0: loss must be a number"):
        column(read_log(tmp_path / "log.jsonl"), "loss", tmp_path / "log.jsonl")


# ---- what evaluation is told


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"clips": 0}, ValueError, "clips must be >= 1, got 0"),
        ({"clips": -1}, ValueError, "clips must be >= 1, got -1"),
        ({"clips": 2.5}, TypeError, "clips must be an integer, got 2.5"),
        ({"batch": 0}, ValueError, "batch must be >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        (
            {"lpips": "x.pt"},
            ValueError,
            r"lpips needs frames of shape \[3, >= 31, >= 31\], but the run's are .*16",
        ),
        ({"pixels": "frames"}, ValueError, "pixels is for runs on tokens, and this run is on pixels; got frames"),
        ({"tokenizer": "tok"}, ValueError, "tokenizer is for runs on tokens, and this run is on pixels; got tok"),
        ({"against": "nothing"}, ValueError, "nothing is not a run directory"),
    ],
)
def test_evaluation_is_refused_before_anything_is_loaded(
    config: TrainingConfig, tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    run = begun(config, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(kind, match=message):
        evaluate(run, progress=False, **options)


def test_frames_too_small_for_ssim_are_told(data: Path, tmp_path: Path) -> None:
    video = zarr.open_group(str(data))
    small = np.asarray(video["data/img"])[:, ::4, ::4]
    del video["data/img"]
    array = video.create_array("data/img", shape=small.shape, chunks=(64, *small.shape[1:]), dtype="uint8")
    array[:] = small
    heads = HeadsConfig(Horizons.next_frame())
    config = small_config(data)
    config = replace(config, steps=1, model=replace(config.model, frame=(3, 4, 4), heads=heads))
    run = begun(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"frames must be at least 6 x 6 pixels for SSIM, got 4 x 4"):
        evaluate(run, progress=False)


@pytest.mark.parametrize("field", ["held_out", "steps", "lr", "seed"])
def test_options_of_the_wrong_type_are_named(config: TrainingConfig, field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} must be (an integer|a number)"):
        replace(config, **{field: "3"})
    assert os.path.isabs(config.data)
