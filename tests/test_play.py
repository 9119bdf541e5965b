"""mfwm play without a browser: keys, forecasts and their errors, recordings, and runs that cannot be played."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfwm import HeadsConfig, cli
from mfwm.data import Replay
from mfwm.data.check import check
from mfwm.models.rollouts import rollout_with_drift
from mfwm.play import protocol
from mfwm.play.actions import Actions, keys_of
from mfwm.play.policy import RandomPolicy
from mfwm.play.recorder import Recorder, write
from mfwm.play.session import Session
from mfwm.play.starts import choose_starts, frames_of
from mfwm.play.world import World, drift_level, load_world
from mfwm.training import train
from play_run import trained
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons

LONGEST = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(trained(tmp_path_factory.mktemp("play")))


# ---- keys

PROCGEN = ["LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NOOP", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP", *"DAWSQE"]
ATARI = ["NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "UPRIGHTFIRE", "LEFTFIRE"]
DOOM = ["NOOP", "TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_LEFT", "MOVE_RIGHT", "ATTACK"]


@pytest.mark.parametrize("names", [PROCGEN, ATARI, DOOM, [f"action {i}" for i in range(12)]])
def test_every_action_has_keys_of_its_own(names: list[str]) -> None:
    noop = names.index("NOOP") if "NOOP" in names else 0
    keys = keys_of(names, noop)
    assert keys[noop] == [] and all(groups for i, groups in enumerate(keys) if i != noop)
    assert len({str(groups) for groups in keys}) == len(names)
    used = {code for groups in keys for group in groups for code in group}
    assert not used & {"KeyP", "KeyN", "KeyR", "KeyO", "KeyC"}


def test_keys_are_what_the_names_say() -> None:
    assert keys_of(["NOOP", "RIGHT+UP", "FIRE", "UPLEFTFIRE"], 0) == [
        [],
        [("ArrowRight", "KeyD"), ("ArrowUp", "KeyW")],
        [("Space",)],
        [("ArrowUp", "KeyW"), ("ArrowLeft", "KeyA"), ("Space",)],
    ]
    # In procgen, D is an action, so the D key is not RIGHT.
    keys = dict(zip(PROCGEN, keys_of(PROCGEN, 4), strict=True))
    assert keys["D"] == [("KeyD",)] and keys["RIGHT"] == [("ArrowRight",)]


def test_more_actions_than_keys() -> None:
    keys = keys_of([f"action {i}" for i in range(60)], 0)
    assert keys[1] == [("Digit1",)] and keys[59] == [] and len({str(groups) for groups in keys if groups}) == 31


def test_actions_are_checked() -> None:
    discrete = Actions("discrete", ["a", "b"], [[], [("KeyB",)]])
    assert discrete.checked(1) == 1 and discrete.rest == 0
    for wrong in (2, -1, None, [0], 10**400):
        with pytest.raises(ValueError, match=r"action must be in 0\.\.1"):
            discrete.checked(wrong)
    continuous = Actions("continuous", low=[-1.0, 2.0], high=[1.0, 3.0])
    assert continuous.rest == (0.0, 2.0) and continuous.checked([5, 2.5]) == (1.0, 2.5)
    for wrong in ([1.0], 3, [1.0, "x"], [1.0, float("nan")], [1.0, 10**400]):
        with pytest.raises(ValueError, match="action must"):
            continuous.checked(wrong)
    with pytest.raises(ValueError, match="this model has none"):
        Actions("none").checked(0)


# ---- a walk


def test_panels_are_smaller_with_their_horizons(world: World) -> None:
    session, starts = Session(world, 0), choose_starts(world, np.random.default_rng(0))
    moment = session.reset(starts[0], [1] * LONGEST)
    assert [picture.shape for picture in moment.expected] == [(16, 16, 3), (8, 8, 3), (4, 4, 3), (2, 2, 3)]
    assert moment.past == [None] * 4 and np.isnan(moment.errors).all()
    # The start is a real frame of a held-out episode.
    assert starts[0].episode in world.episodes
    assert np.array_equal(moment.frame, world.replay.video[starts[0].last])


def test_frames_and_errors_are_those_of_a_rollout_with_drift(world: World) -> None:
    session, start = Session(world, 0), choose_starts(world, np.random.default_rng(0))[0]
    taken = np.random.default_rng(1).integers(0, 4, 20 + LONGEST).tolist()
    moments = [session.reset(start, taken[:LONGEST])]
    moments += [session.step(taken[i], taken[i + 1 : i + 1 + LONGEST]) for i in range(12)]
    frames, before = frames_of(world, start)
    assert before is not None
    actions = torch.cat([before, torch.tensor([taken])], dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        rolled, drift = rollout_with_drift(world.model, frames, actions, 12)
    for i, moment in enumerate(moments[1:]):
        want = ((rolled[0, i] + 1) * 127.5).permute(1, 2, 0).numpy()
        # Where the CPU multiplies bf16, the walk does too.
        assert np.abs(moment.frame - want).mean() < 6, i
        assert np.array_equal(np.isnan(moment.errors), drift[0, i].isnan().numpy()), i
        np.testing.assert_allclose(moment.errors, drift[0, i].numpy(), rtol=0.5, atol=5e-3)
    # What it had expected is what was shown then.
    assert np.array_equal(moments[12].past[3], moments[4].expected[3])


def test_a_forecast_counts_only_if_its_actions_were_taken(world: World) -> None:
    session, start = Session(world, 0), choose_starts(world, np.random.default_rng(0))[0]
    session.reset(start, [0] * LONGEST)
    for _ in range(7):
        session.step(0, [0] * LONGEST)
    held = session.step(0, [0] * LONGEST)
    assert not np.isnan(held.errors).any()
    changed = session.step(1, [1] * LONGEST)
    assert np.isnan(changed.errors).all() and changed.past == [None] * 4
    # A look before the step tells what the new key leads to, so the nearest forecast counts.
    session.look([2] * LONGEST)
    assert np.isnan(session.step(2, [2] * LONGEST).errors).tolist() == [False, True, True, True]


def test_keys_steer_and_a_seed_repeats(world: World) -> None:
    start = choose_starts(world, np.random.default_rng(0))[0]

    def picture(action: int) -> np.ndarray:
        session = Session(world, 0)
        session.reset(start, [0] * LONGEST)
        for _ in range(6):
            moment = session.step(action, [action] * LONGEST)
        return moment.frame

    assert np.array_equal(picture(1), picture(1)) and not np.array_equal(picture(0), picture(1))


def test_the_random_policy_is_known_ahead(world: World) -> None:
    policy, same = RandomPolicy(world.actions, 3), RandomPolicy(world.actions, 3)
    plan = policy.plan(30)
    assert plan == policy.plan(30) == [same.next() for _ in range(30)] and len(set(plan)) == 4
    assert policy.next() == plan[0] and policy.plan(29) == plan[1:]


def test_the_level_of_drift(tmp_path: Path) -> None:
    path = tmp_path / "clips.npz"
    assert drift_level(path) is None
    drift = np.array([[np.nan, 0.1, 0.4], [np.nan, 0.2, 0.6]])
    np.savez(path, drift=drift, rollout_mse=[[1, 1, 3], [1, 1, 3]], persistence_rollout_mse=np.full((2, 3), 2.0))
    assert drift_level(path) == pytest.approx(0.5)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        drift_level(path)


# ---- messages


def test_a_moment_is_packed_in_order(world: World) -> None:
    session, start = Session(world, 0), choose_starts(world, np.random.default_rng(0))[0]
    session.reset(start, [0] * LONGEST)
    moment = session.step(0, [0] * LONGEST)
    packed = protocol.pack(moment, number=7, milliseconds=1.5)
    kind, flags, panels, have, height, width, step, number, milliseconds = protocol.HEADER.unpack_from(packed)
    assert (kind, flags, panels, have, height, width, step, number, milliseconds) == (1, 0, 4, 1, 16, 16, 1, 7, 1.5)
    rest = packed[protocol.HEADER.size + 16 :]
    assert rest[: 16 * 16 * 3] == moment.frame.tobytes()
    assert len(rest) == 3 * (256 + 2 * 256 + 64 + 16 + 4)


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "1", "null", "{}", '{"kind": 3}', '{"kind": "quit"}', '{"kind": "act", "number": 1}', "[" * 4000,
     '{"kind": "act", "number": -1, "action": 0}', '{"kind": "act", "number": true, "action": 0}',
     '{"kind": "act", "number": 1, "action": "0"}', '{"kind": "pause", "on": 1}', '{"kind": "step", "by": 2}',
     '{"kind": "temperature", "value": NaN}', '{"kind": "temperature", "value": 1e9}', '{"kind": ["step"]}'],
)  # fmt: skip
def test_malformed_messages(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|one of"):
        protocol.parsed(text)


def test_well_formed_messages() -> None:
    for message in (
        {"kind": "step"},
        {"kind": "act", "number": 1, "action": [0.5, 1]},
        {"kind": "reset", "start": None},
    ):
        assert protocol.parsed(json.dumps(message)) == message


# ---- recordings


def test_a_recording_is_a_sound_set_that_trains(world: World, tmp_path: Path) -> None:
    session, start = Session(world, 0), choose_starts(world, np.random.default_rng(0))[0]
    recorder, moment = Recorder(world), session.reset(start, [0] * LONGEST)
    recorder.begin("model")
    frames = [moment.frame]
    for i in range(60):
        recorder.add(moment.frame, i % 4)
        moment = session.step(i % 4, [0] * LONGEST)
        frames.append(moment.frame)
    recorder.cut(moment.frame)
    path = write(world, "model", recorder.taken(), 15.0)
    assert path == world.run / "play" / "0001" and check(path, 16) == []
    replay = Replay(path)
    assert np.array_equal(replay.video, np.stack(frames)) and replay.action.tolist() == [*(i % 4 for i in range(60)), 0]
    assert replay.attributes["recorded_from"] == "model" and replay.attributes["env"] == "squares"
    assert (path.parent / "0001.gif").read_bytes().startswith(b"GIF89a")
    config = replace(small_config(path), steps=1, clip=12)
    train(config, tmp_path / "again", progress=False)
    # The next recording gets the next number.
    recorder.begin("model")
    recorder.add(moment.frame, 1)
    recorder.cut(moment.frame)
    assert write(world, "model", recorder.taken(), 15.0).name == "0002" and not recorder.on


# ---- runs that cannot be played


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["mfwm", "play", *map(str, arguments), "--no-browser"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith("mfwm: ") and told.count("\n") == 1
    return told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "port must be in 0..65535, got 65536"),
        (["--fps", "0"], "fps must be in 0.1..120, got 0.0"),
        (["--fps", "nan"], "fps must be in 0.1..120, got nan"),
        (["--seed", "-1"], "seed must be >= 0, got -1"),
        ([], "is not a run directory: it has no config.json"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: Any, message: str
) -> None:
    assert message in refused(monkeypatch, capsys, tmp_path / "nothing", *options)


def test_a_run_without_a_checkpoint_or_a_port_in_use(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.run, tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints", "play"))
    assert "has no checkpoint: train first" in refused(monkeypatch, capsys, tmp_path / "half")
    shutil.rmtree(tmp_path / "half")
    shutil.copytree(world.run, tmp_path / "half")
    for file in (tmp_path / "half").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    refused(monkeypatch, capsys, tmp_path / "half")
    assert "cannot be listened on" in refused(monkeypatch, capsys, world.run, "--host", "203.0.113.1")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (HeadsConfig(Horizons((2, 4), (1, 2))), "cannot be rolled out"),
        (HeadsConfig(Horizons((1, 2), (2, 2))), "cannot be rolled out"),
        (HeadsConfig(Horizons((1, 2), (1, 2)), output="latents"), "latents, which have no pictures"),
    ],
)
def test_runs_that_have_no_next_picture(tmp_path: Path, heads: HeadsConfig, message: str) -> None:
    moving_squares(tmp_path / "data")
    config = small_config(tmp_path / "data")
    config = replace(config, steps=1, model=replace(config.model, heads=heads))
    if heads.output == "latents":
        # Such a run comes from a trainer of one's own.
        train(
            replace(config, model=replace(config.model, heads=replace(heads, output="pixels"))),
            tmp_path / "run",
            progress=False,
        )
        path = tmp_path / "run" / "config.json"
        path.write_text(path.read_text().replace('"pixels"', '"latents"'))
    else:
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=message):
        load_world(tmp_path / "run")
