"""The state that `collect` records is where the frames show it: objects are found at their stated positions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfwm.data import Replay
from mfwm.data.atari import KNOWN
from mfwm.data.check import check
from mfwm.data.collect import collect
from mfwm.data.procgen import PYTHONS, procgen_home
from mfwm.data.procgen_state import matched

# A window that holds half of an object, in pixels of the 160 x 210 screen for Atari, and at size 64 for procgen.
OBJECTS: dict[str, dict[str, tuple[float, float]]] = {
    "atari:Freeway": {**{f"car{lane}": (4.5, 5.5) for lane in range(10)}, "chicken": (4.5, 5.0)},
    "atari:Pong": {"ball": (3.0, 4.5), "player": (3.0, 13.0), "enemy": (3.0, 10.0)},
    "atari:Breakout": {"ball": (3.0, 4.5), "paddle": (10.0, 3.0)},
    "bigfish": {"agent": (4.0, 4.0), **{f"fish{i}": (6.0, 5.0) for i in range(6)}},
    "chaser": {"agent": (3.0, 3.0), **{f"enemy{i}": (3.0, 3.0) for i in range(3)}},
    "dodgeball": {"agent": (4.0, 4.0), **{f"enemy{i}": (4.0, 4.0) for i in range(4)}, "ball0": (2.5, 2.5)},
}


def record(env: str, path: Path, frames: int, **options: Any) -> Replay:
    if env.startswith("atari"):
        pytest.importorskip("ale_py")
    elif env.startswith("doom"):
        pytest.importorskip("vizdoom")
    elif env != "balls":
        if sys.version_info[:2] not in PYTHONS or not (procgen_home() / "complete").exists():
            pytest.skip("procgen's environment, which `mfwm collect coinrun` creates, is not there")
    collect(env, frames, path, seed=1, progress=False, **options)
    assert not [problem for problem in check(path, 8) if problem.invalid]
    return Replay(path)


def errors(replay: Replay, name: str, half: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The distances in pixels between an object's stated position and the middle of what differs there from the
    episode's median frame. Only where the object has left its own median place, is whole within low .. high and has no
    other near."""
    names = replay.state_names
    everyone = [i for i, column in enumerate(names) if column.endswith("_x")]
    own = names.index(f"{name}_x")
    found = []
    for begin, end in zip(replay.episode_starts, replay.episode_ends, strict=True):
        if end - begin < 30:
            continue
        video, state = replay.video[begin:end].astype(np.float32), replay.state[begin:end]
        change = np.abs(video - np.median(video, axis=0)).sum(axis=3)
        usual = np.nanmedian(state[:, own : own + 2], axis=0) if np.isfinite(state[:, own]).any() else np.zeros(2)
        middle = np.arange(video.shape[1]) + 0.5
        for t in range(end - begin):
            at = state[t, own : own + 2]
            away = [np.abs(state[t, i : i + 2] - at) / half for i in everyone if i != own]
            if (
                not np.isfinite(at).all()
                or (at < low + half).any()
                or (at > high - half).any()
                or (np.abs(at - usual) < 2 * half + 1).all()
                or any((apart < 2.5).all() for apart in away)
            ):
                continue
            near = [np.abs(middle - place) < reach + 1 for place, reach in zip(at, half, strict=True)]
            weight = change[t] * near[1][:, None] * near[0][None, :]
            total = weight.sum()
            if total < 60:
                found.append(np.inf)
                continue
            seen = np.array([(weight.sum(axis=0) * middle).sum(), (weight.sum(axis=1) * middle).sum()]) / total
            found.append(float(np.linalg.norm(seen - at)))
    return np.array(found)


def must_be_there(replay: Replay, objects: dict[str, np.ndarray], low: np.ndarray, high: np.ndarray) -> None:
    """Each object is within 2 pixels of its stated position in nearly all frames, and within 1 in most."""
    measured = 0
    for name, half in objects.items():
        error = errors(replay, name, half, low, high)
        measured += len(error)
        if len(error) >= 10:
            typical, most = np.quantile(error, [0.5, 0.95])
            print(f"{replay.attributes['env']} {name}: {typical:.2f}, {most:.2f} pixels, {len(error)} frames")
            assert typical < 1 and most < 2, name
    assert measured > 100


@pytest.mark.parametrize("env", ["atari:Freeway", "atari:Pong", "atari:Breakout"])
@pytest.mark.parametrize("field", [True, False])
def test_atari_objects_are_where_the_state_says(tmp_path: Path, env: str, field: bool) -> None:
    size = 96 if field else 128
    replay = record(env, tmp_path / "set", 300, size=size, field=field)
    assert replay.attributes["ticks_per_frame"] == 4
    # Low and high corner of the recorded part of the screen, and of the field, outside which objects are hidden.
    top, bottom, left, right = KNOWN[env.removeprefix("atari:")].field
    shown = np.array([[left, top], [right, bottom]]) if field else np.array([[0, 0], [160, 210]])
    scale = size / (shown[1] - shown[0])
    low, high = (np.array([[left, top], [right, bottom]]) - shown[0]) * scale
    must_be_there(replay, {name: half * scale for name, half in OBJECTS[env].items()}, low, high)


@pytest.mark.parametrize("env", ["bigfish", "chaser", "dodgeball"])
def test_procgen_objects_are_where_the_state_says(tmp_path: Path, env: str) -> None:
    replay = record(env, tmp_path / "set", 600)
    assert replay.attributes["ticks_per_frame"] == 1
    must_be_there(replay, {name: np.array(half) for name, half in OBJECTS[env].items()}, np.zeros(2), np.full(2, 64.0))
    # The same recording at half the size has its positions halved.
    half = record(env, tmp_path / "half", 200, size=32)
    again = record(env, tmp_path / "again", 200)
    assert np.array_equal(half.action, again.action)
    np.testing.assert_allclose(half.state, again.state / 2, rtol=1e-5)


def test_atari_states_count_no_ball_that_is_not_drawn(tmp_path: Path) -> None:
    replay = record("atari:Pong", tmp_path / "set", 300, size=96, field=True)
    x, y = replay.state[:, :2].T
    shown = np.isfinite(x)
    assert np.array_equal(shown, np.isfinite(y)) and 0.2 < shown.mean() < 0.95
    assert np.isfinite(replay.state[:, 2:]).all()
    # The ball is all that is blue-white between the paddles.
    blue = replay.video[:, :, 14:82, 2].max(axis=(1, 2))
    between = shown & (x > 16) & (x < 80) & (y > 2) & (y < 94)
    assert (blue[between] > 80).all() and (blue[~shown] < 40).all()


def test_frame_skip_of_atari_repeats_the_action(tmp_path: Path) -> None:
    """The car in lane 4 drives a pixel of the screen a tick, and a frame of skip 3 is 12 ticks."""
    replay = record("atari:Freeway", tmp_path / "set", 80, size=64, frame_skip=3, field=True)
    assert replay.attributes["ticks_per_frame"] == 12
    x = replay.state[:, replay.state_names.index("car4_x")]
    moved = np.diff(x)[2:]
    assert np.median(moved) == pytest.approx(-12 * 64 / 152, abs=0.01)


def test_frame_skip_of_procgen_repeats_the_action(tmp_path: Path) -> None:
    """Fish swim at constant speeds: their positions differ by their velocities, which are per recorded frame."""
    speeds = []
    for skip in (1, 3):
        replay = record("bigfish", tmp_path / f"set{skip}", 400, frame_skip=skip)
        assert replay.attributes["ticks_per_frame"] == skip
        columns = [replay.state_names.index(f"fish{i}_x") for i in range(8)]
        for begin, end in zip(replay.episode_starts, replay.episode_ends, strict=True):
            x = replay.state[begin:end][:, columns]
            velocity = replay.state[begin:end][:, [column + 2 for column in columns]]
            same = (velocity[1:] == velocity[:-1]) & np.isfinite(x[1:]) & np.isfinite(x[:-1])
            np.testing.assert_allclose(np.diff(x, axis=0)[same], velocity[:-1][same], atol=1e-3)
            speeds += [(skip, speed) for speed in np.abs(velocity[:-1][same])]
    # 0.15 to 0.4 units a tick, of 3.2 pixels each.
    for skip in (1, 3):
        found = [speed for at, speed in speeds if at == skip]
        assert len(found) > 50 and 0.15 * 3.2 * skip <= min(found) <= max(found) <= 0.4 * 3.2 * skip + 1e-5


def test_an_object_keeps_its_place() -> None:
    def objects(*rows: tuple[float, float, float, float]) -> np.ndarray:
        return np.array(rows, np.float64).reshape(-1, 4)

    nothing = np.full((3, 4), np.nan)
    first = matched(nothing, objects((1, 1, 0.5, 0), (8, 8, 0, 0)))
    assert first[:, 0].tolist()[:2] == [1, 8] and np.isnan(first[2]).all()
    # The list loses its first and gains a third: the second keeps its place, and the new one takes the free one.
    assert matched(first, objects((8, 8.2, 0, 0), (4, 4, 0, 0)))[:, 0].tolist()[:2] == [4, 8]
    # Two that meet and pass through each other keep theirs, whatever their order in the list.
    before = objects((5.0, 5, 0.5, 0), (5.4, 5, -0.5, 0))
    assert matched(before, objects((4.9, 5, -0.5, 0), (5.5, 5, 0.5, 0)))[:, 0].tolist() == [5.5, 4.9]
    # More than there are places for.
    assert matched(nothing[:1], objects((1, 1, 0, 0), (2, 2, 0, 0)))[:, 0].tolist() == [1]


def turned(frame: np.ndarray, degrees: float) -> np.ndarray:
    """What a camera at `frame`'s place with 90 degrees to its sides sees after turning to the left: the middle row."""
    height, width = frame.shape[:2]
    # At a side, the direction is 45 degrees off; columns are as far from the middle as its tangent.
    column = (np.arange(width) + 0.5) / width * 2 - 1
    source = np.tan(np.arctan(column) - np.radians(degrees))
    index = (source + 1) / 2 * width - 0.5
    seen = np.full((width, 3), np.nan)
    inside = (index >= 0) & (index <= width - 1)
    row = frame[height // 2 - 2 : height // 2].astype(float).mean(axis=0)
    for channel in range(3):
        seen[inside, channel] = np.interp(index[inside], np.arange(width), row[:, channel])
    return seen


def test_doom_turns_by_the_angle_that_the_state_says(tmp_path: Path) -> None:
    """Where the player only turns, the next picture is this one shifted by the difference of their angles."""
    replay = record("doom", tmp_path / "set", 400, size=120)
    assert replay.state_names == ["x", "y", "z", "angle", "vx", "vy"]
    assert replay.attributes["state_units"][3] == "degrees"
    best = []
    for t in range(replay.frames - 1):
        now, after = replay.state[t], replay.state[t + 1]
        by = (after[3] - now[3] + 180) % 360 - 180
        if np.linalg.norm(after[:2] - now[:2]) > 1 or not 3 < abs(by) < 30:
            continue
        goal = turned(replay.video[t + 1], 0)
        fits = {d: np.nanmean(np.abs(turned(replay.video[t], d) - goal)) for d in by + np.arange(-12.0, 12.1, 1.0)}
        if max(fits.values()) > 2 * min(fits.values()) + 4:
            best.append(min(fits, key=fits.__getitem__) - by)
    assert len(best) >= 10 and np.median(np.abs(best)) <= 1, best


def test_doom_moves_by_the_position_that_the_state_says(tmp_path: Path) -> None:
    """Positions change about as the speeds say, and the picture with them."""
    replay = record("doom", tmp_path / "set", 300, size=32, frame_skip=2)
    assert replay.attributes["ticks_per_frame"] == 8
    inside = np.flatnonzero(np.isin(np.arange(1, 300), replay.episode_starts, invert=True))
    moved = np.linalg.norm(np.diff(replay.state[:, :2], axis=0), axis=1)[inside]
    speed = np.linalg.norm(replay.state[1:, 4:], axis=1)[inside]
    assert np.corrcoef(moved, speed)[0, 1] > 0.7 and moved.max() > 5
    changed = np.abs(np.diff(replay.video.astype(float), axis=0)).mean(axis=(1, 2, 3))[inside]
    assert (changed[moved > 5] > 2).all()


@pytest.mark.parametrize("env", ["atari:Pong", "atari:Breakout"])
def test_rallies_last(tmp_path: Path, env: str) -> None:
    """The paddle is nearer to the ball than chance would have it, and the ball is mostly in play."""
    replay = record(env, tmp_path / "set", 600, size=96, field=True)
    paddle, ball = ("player_y", "ball_y") if env == "atari:Pong" else ("paddle_x", "ball_x")
    a, b = (replay.state[:, replay.state_names.index(name)] for name in (paddle, ball))
    shown = np.isfinite(b)
    assert shown.mean() > 0.6
    chance = np.abs(a[shown][:, None] - b[shown][None, :]).mean()
    assert np.abs(a - b)[shown].mean() < 0.9 * chance


def test_other_games_have_no_state(tmp_path: Path) -> None:
    replay = record("atari:Tennis", tmp_path / "set", 40, size=32)
    assert replay.frames == 40 and replay.state_names == [] and replay.state.shape == (40, 0)
