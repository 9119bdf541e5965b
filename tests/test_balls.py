"""The world of balls: its mechanics, its pictures and what is kept of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfwm.cli import main
from mfwm.data import Replay
from mfwm.data.balls import ACTIONS, BACKGROUND, COLORS, RADIUS, Balls, Box, draw
from mfwm.data.check import check
from mfwm.data.collect import collect

NOOP = ACTIONS["NOOP"]


def velocities(box: Box) -> np.ndarray:
    return np.stack([box.vx, box.vy], axis=1)


def centers(box: Box) -> np.ndarray:
    return np.stack([box.x, box.y], axis=1)


@pytest.mark.parametrize("count", [3, 5])
def test_energy_and_momentum_are_conserved(count: int) -> None:
    """Energy always; momentum where no ball hits a wall, and a wall reverses one component of one ball."""
    box = Box(Balls(count=count, speed=0.05), np.random.default_rng(count))
    energy = (velocities(box) ** 2).sum()
    hits, between = [], []
    bounce = box.bounce

    def watched(i: int, j: int) -> None:
        before, at = velocities(box), centers(box)
        bounce(i, j)
        change = velocities(box) - before
        if j < 0:
            axis = -1 - j
            hits.append(j)
            assert change[i, axis] == -2 * before[i, axis] and np.count_nonzero(change) == 1
            assert at[i, axis] == pytest.approx(RADIUS if before[i, axis] < 0 else 1 - RADIUS, abs=1e-12)
        else:
            between.append((i, j))
            assert np.abs(change.sum(axis=0)).max() < 1e-15
            assert math.dist(at[i], at[j]) == pytest.approx(2 * RADIUS, abs=1e-9)
            assert set(np.nonzero(change)[0]) <= {i, j}

    box.bounce = watched  # type: ignore[method-assign]
    for _ in range(3000):
        box.step(NOOP)
    assert set(hits) == {-1, -2} and len(between) > 50
    assert (velocities(box) ** 2).sum() == pytest.approx(energy, rel=1e-10)


def test_a_head_on_impact_exchanges_velocities() -> None:
    box = Box(Balls(count=2), np.random.default_rng(0))
    box.x, box.y, box.vx, box.vy = [0.3, 0.6], [0.5, 0.5], [0.2, 0.0], [0.0, 0.0]
    # They touch after half a frame: 0.3 apart, less 0.2 for the radii, at 0.2 a frame.
    box.step(NOOP)
    assert box.state() == pytest.approx([0.4, 0.5, 0, 0, 0.7, 0.5, 0.2, 0])
    # A quarter past the wall, and back.
    box.x, box.vx = [0.3, 0.85], [0.0, 0.2]
    box.step(NOOP)
    assert box.state()[4:] == pytest.approx([0.75, 0.5, -0.2, 0])


@pytest.mark.parametrize("speed", [0.01, 0.2])
def test_balls_neither_overlap_nor_leave(speed: float) -> None:
    rng = np.random.default_rng(1)
    box = Box(Balls(count=5, speed=speed), rng)
    pushes = list(ACTIONS.values())
    for number in rng.integers(len(pushes), size=3000):
        box.step(pushes[number])
        at = centers(box)
        distance = np.linalg.norm(at[:, None] - at, axis=2)[np.triu_indices(5, 1)]
        assert distance.min() >= 2 * RADIUS - 1e-9
        assert at.min() >= RADIUS - 1e-12 and at.max() <= 1 - RADIUS + 1e-12


def test_an_action_changes_the_pushed_ball_only() -> None:
    options = Balls(count=4, speed=0.02)

    def placed() -> Box:
        """With room around every ball, so that none hits anything in a frame."""
        box = Box(options, np.random.default_rng(2))
        box.x, box.y = [0.3, 0.7, 0.3, 0.7], [0.3, 0.3, 0.7, 0.7]
        return box

    still = placed()
    still.step(NOOP)
    for name, direction in ACTIONS.items():
        box = placed()
        box.step(direction)
        moved = np.array(box.state()) - still.state()
        assert not moved[4:].any(), name
        assert moved[:4] == pytest.approx([d * options.speed / 2 for d in (*direction, *direction)], abs=1e-15), name


def test_pushes_have_a_limit() -> None:
    box = Box(Balls(count=1, speed=0.02), np.random.default_rng(0))
    box.vx, box.vy = [0.039], [0.0]
    box.pushed(ACTIONS["RIGHT"])
    assert box.vx == pytest.approx([0.04])
    # What an impact made faster is not slowed down by a push along its way, nor sped up.
    box.vx = [0.07]
    box.pushed(ACTIONS["RIGHT"])
    assert box.vx == pytest.approx([0.07])
    box.pushed(ACTIONS["LEFT"])
    assert box.vx == pytest.approx([0.06])


@pytest.mark.parametrize("size", [32, 48, 64])
def test_drawing_shows_motion_by_less_than_a_pixel(size: int) -> None:
    """The middle of a ball's brightness is its position to a twentieth of a pixel, wherever it is."""
    at = np.random.default_rng(0).uniform(RADIUS * size, (1 - RADIUS) * size, (200, 1, 2))
    img = draw(at, size, Balls(), np.random.default_rng(0))
    assert img.shape == (200, size, size, 3) and img.dtype == np.uint8
    weight = (img[..., 0] - BACKGROUND) / (COLORS[0, 0] - BACKGROUND)
    assert weight.sum(axis=(1, 2)) == pytest.approx(math.pi * (RADIUS * size) ** 2, rel=0.03)
    middle = np.arange(size) + 0.5
    found = np.stack([(weight.sum(axis=1) * middle).sum(axis=1), (weight.sum(axis=2) * middle).sum(axis=1)], axis=1)
    assert np.abs(found / weight.sum(axis=(1, 2))[:, None] - at[:, 0]).max() < 0.05


def record(path: Path, frames: int = 300, seed: int = 3, size: int = 32, frame_skip: int = 1, **options: Any) -> Replay:
    balls = Balls(**options)
    collect("balls", frames, path, seed=seed, size=size, frame_skip=frame_skip, balls=balls, progress=False)
    assert not [problem for problem in check(path, 16) if problem.invalid]
    return Replay(path)


@pytest.mark.parametrize("options", [{}, {"count": 5, "noise": 0.1}, {"count": 3, "texture": True, "speed": 0.05}])
@pytest.mark.parametrize("size", [32, 64])
def test_balls_are_where_the_state_says(tmp_path: Path, options: dict[str, Any], size: int) -> None:
    replay = record(tmp_path / "set", size=size, **options)
    count = options.get("count", 4)
    assert replay.video.shape == (300, size, size, 3) and replay.episode_lengths.tolist() == [256, 44]
    assert replay.state_names[:5] == ["ball0_x", "ball0_y", "ball0_vx", "ball0_vy", "ball1_x"]
    assert replay.attributes["state_units"][:4] == ["pixels", "pixels", "pixels/frame", "pixels/frame"]
    assert replay.state.shape == (300, 4 * count)
    for ball in range(count):
        x, y = np.floor(replay.state[:, 4 * ball : 4 * ball + 2]).astype(int).T
        shown = replay.video[np.arange(300), y, x].astype(float)
        # Noise of 0.1 is 25 levels; the mean over frames is near the color, but for what is clipped at 255.
        assert np.abs(shown - COLORS[ball]).max() < (160 if "noise" in options else 2)
        assert np.abs(shown.mean(axis=0) - COLORS[ball]).max() < 15


def test_the_state_moves_as_it_says(tmp_path: Path) -> None:
    """Between impacts a ball moves by its velocity, which is that of the recorded frames."""
    for skip in (1, 3):
        replay = record(tmp_path / f"set{skip}", frame_skip=skip, speed=0.01)
        assert replay.attributes["ticks_per_frame"] == skip
        state = replay.state.reshape(300, 4, 4)[:256]
        moved, velocity = np.diff(state[..., :2], axis=0), state[:-1, :, 2:]
        steady = (np.diff(state[..., 2:], axis=0) == 0).all(axis=2)
        steady[:, 0] = False
        assert steady.mean() > 0.5
        assert np.abs(moved - velocity)[steady].max() < 1e-4
        assert np.linalg.norm(velocity[0, 1:], axis=1) == pytest.approx(np.full(3, 0.32 * skip), rel=0.51)


def test_frame_skip_repeats_the_action_and_keeps_every_kth_frame(tmp_path: Path) -> None:
    skip, seed = 4, 3
    replay = record(tmp_path / "set", frames=60, seed=seed, frame_skip=skip)
    box = Box(Balls(), np.random.default_rng((seed, 0)))
    assert len(set(replay.action.tolist())) == len(ACTIONS)
    for action, state in zip(replay.action, replay.state, strict=True):
        expected = np.array(box.state()).reshape(4, 4) * [32, 32, 32 * skip, 32 * skip]
        assert state == pytest.approx(expected.reshape(-1), abs=1e-4)
        for _ in range(skip):
            box.step(list(ACTIONS.values())[action])


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise": 0.1, "texture": True}
    first, again = record(tmp_path / "first", **options), record(tmp_path / "again", **options)
    assert first.video.tobytes() == again.video.tobytes()
    assert first.state.tobytes() == again.state.tobytes() and np.array_equal(first.action, again.action)
    other = record(tmp_path / "other", seed=4, **options)
    assert not np.array_equal(first.state, other.state) and not np.array_equal(first.action, other.action)
    # A longer recording begins with the shorter one's frames.
    longer = record(tmp_path / "longer", frames=400)
    assert np.array_equal(longer.state[:256], record(tmp_path / "shorter").state[:256])


def test_the_dials_show(tmp_path: Path) -> None:
    plain = record(tmp_path / "plain", frames=100).video.astype(float)
    for noise in (0.1, 0.3):
        noisy = record(tmp_path / f"noise{noise}", frames=100, noise=noise).video.astype(float)
        grown = noisy - plain
        # Clipping at 0 and 255 takes part of it away: BACKGROUND is 24 levels from 0.
        assert 0.5 * 255 * noise < grown.std() < 255 * noise
        assert np.std(grown[:-1] - grown[1:]) > grown.std()
    textured = record(tmp_path / "texture", frames=100, texture=True).video.astype(float)
    background = np.median(textured, axis=0)
    assert background.std() > 30 and (np.abs(textured - background).max(axis=3) < 1).mean() > 0.5


def test_bad_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"count": 0}, r"balls.count must be in 1..6, got 0"),
        ({"count": 7}, r"balls.count must be in 1..6, got 7"),
        ({"speed": 0.0}, r"balls.speed must be above 0 and at most 0.5, got 0.0"),
        ({"speed": math.nan}, r"balls.speed must be above 0 and at most 0.5, got nan"),
        ({"noise": -0.1}, r"balls.noise must be in 0..1, got -0.1"),
        ({"noise": math.inf}, r"balls.noise must be in 0..1, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            Balls(**options)
    with pytest.raises(ValueError, match=r'balls must be None unless env is "balls"'):
        collect("doom", 10, tmp_path / "set", balls=Balls())
    for env in ("balls", "doom", "coinrun", "atari:Tennis"):
        with pytest.raises(ValueError, match=f"field must be False for '{env}': only atari:Freeway, atari:Pong"):
            collect(env, 10, tmp_path / "set", field=True)
    with pytest.raises(ValueError, match="frame_skip must be >= 1, got 0"):
        collect("balls", 10, tmp_path / "set", frame_skip=0)
    assert not list(tmp_path.iterdir())
    arguments = "collect balls --frames 20 --size 48 --balls.count 3 --balls.noise 0.3 --frame-skip 2 --out"
    monkeypatch.setattr("sys.argv", ["mfwm", *arguments.split(), str(tmp_path / "set")])
    main()
    replay = Replay(tmp_path / "set")
    assert replay.frame == (3, 48, 48) and replay.state.shape == (20, 12)
    assert replay.attributes["balls"]["noise"] == 0.3 and replay.attributes["ticks_per_frame"] == 2
