"""mfwm play for runs on tokens, for continuous actions, for video without actions, and for drawn frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, served, until
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.data import Replay, ReplayWriter
from mfwm.data.check import check
from mfwm.encode import encode
from mfwm.models.tokenizer import TokenizerConfig
from mfwm.play.policy import RandomPolicy
from mfwm.play.recorder import Recorder, write
from mfwm.play.session import Session
from mfwm.play.starts import choose_starts
from mfwm.play.world import World, load_world
from mfwm.training import TokenizerTraining, train, train_tokenizer
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4), (1, 2, 4))
LONGEST = 4


def tokens_run(folder: Path, **heads: Any) -> Path:
    moving_squares(folder / "data")
    tokenizer = TokenizerConfig((3, 16, 16), 4, (4, 4), 32, 1, 16)
    config = TokenizerTraining(
        str(folder / "data"), 2, model=tokenizer, clip=12, batch=2, look_every=0, tensorboard=False
    )
    train_tokenizer(config, folder / "tokenizer", progress=False)
    encode(folder / "data", folder / "ids", tokenizer=folder / "tokenizer", progress=False)
    options: dict[str, Any] = {"horizons": HORIZONS, "output": "tokens", "vocabulary": 16, **heads}
    masked = options["horizons"].offsets[0] == 0
    model = WorldModelConfig((1, 4, 4), 1, 32, 1, 16, context=8, actions=4, masked=masked, heads=HeadsConfig(**options))
    train(replace(small_config(folder / "ids"), steps=2, model=model), folder / "run", progress=False)
    return folder / "run"


def squares_with(folder: Path, **kind: Any) -> Path:
    """A run on moving_squares with other actions: two continuous numbers, or none."""
    moving_squares(folder / "squares")
    squares = Replay(folder / "squares")
    table = np.array([[0, 1], [0, -1], [0.5, 0], [-0.5, 0]], np.float32)
    size = kind.get("action_size", 0)
    with ReplayWriter(folder / "data", 16, 16, actions=None, action_size=size) as writer:
        for begin, end in zip(squares.episode_starts, squares.episode_ends, strict=True):
            actions = table[squares.action[begin:end]] if size else None
            writer.append(squares.video[begin:end], actions)
    config = small_config(folder / "data")
    heads = replace(config.model.heads, conditioning="actions" if size else "none")
    model = replace(config.model, actions=0, action_size=size, heads=heads)
    train(replace(config, steps=20, lr=1e-2, model=model), folder / "run", progress=False)
    return folder / "run"


def gaussian_run(folder: Path) -> Path:
    moving_squares(folder / "data")
    config = small_config(folder / "data")
    model = replace(config.model, heads=HeadsConfig(HORIZONS, kind="gaussian"))
    train(replace(config, steps=2, model=model), folder / "run", progress=False)
    return folder / "run"


RUNS: dict[str, Any] = {
    "tokens": tokens_run,
    "masked": lambda folder: tokens_run(folder, horizons=Horizons((0, 1, 3), (1, 2, 4))),
    "continuous": lambda folder: squares_with(folder, action_size=2),
    "none": squares_with,
    "gaussian": gaussian_run,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in RUNS.items()}


def walk(world: World, steps: int, seed: int = 0) -> list[Any]:
    session, policy = Session(world, seed), RandomPolicy(world.actions, 0)
    moments = [session.reset(choose_starts(world, np.random.default_rng(0))[0], policy.plan(LONGEST))]
    for _ in range(steps):
        moments.append(session.step(policy.next(), policy.plan(LONGEST)))
    return moments


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_walks_and_is_recorded(runs: dict[str, Path], name: str) -> None:
    world = load_world(runs[name])
    moments = walk(world, 12)
    factors = [2, 4] if name == "masked" else [1, 2, 4]
    assert [panel.factor for panel in world.panels] == factors
    for moment in moments:
        assert moment.frame.shape == (16, 16, 3) and moment.frame.dtype == np.uint8
        assert [picture.shape[0] for picture in moment.expected] == [16 // factor for factor in factors]
    assert np.isfinite(moments[-1].errors).all()
    assert world.samples == (name in ("tokens", "masked", "gaussian"))
    # A walk is repeated by its seed.
    assert all(np.array_equal(a.frame, b.frame) for a, b in zip(moments, walk(world, 12), strict=True))
    recorder = Recorder(world)
    recorder.begin("model")
    for moment in moments[:-1]:
        recorder.add(moment.frame, world.actions.rest)
    recorder.cut(moments[-1].frame)
    path = write(world, "model", recorder.taken(), 15.0)
    assert check(path, 4) == [] and Replay(path).frames == 13


def test_a_temperature_draws_other_tokens(runs: dict[str, Path]) -> None:
    world = load_world(runs["tokens"])
    assert Session(world, 0).temperature == 1.0
    assert not np.array_equal(walk(world, 6)[-1].frame, walk(world, 6, seed=1)[-1].frame)
    session, start = Session(world, 0), choose_starts(world, np.random.default_rng(0))[0]

    def drawn() -> list[bytes]:
        session.reset(start, [0] * LONGEST)
        return [session.step(0, [0] * LONGEST).frame.tobytes() for _ in range(4)]

    # A reset draws the same again.
    assert drawn() == drawn()
    session.reset(start, [0] * LONGEST)
    session.heat(0.0)
    greedy = [session.step(0, [0] * LONGEST).frame for _ in range(3)]
    # What is expected are the most likely tokens, so they are what comes.
    assert session.errors[0] >= 0 and np.array_equal(greedy[-1], session.past[0].picture)


def test_sliders_have_the_ranges_of_the_data(runs: dict[str, Path]) -> None:
    actions = load_world(runs["continuous"]).actions
    assert actions.kind == "continuous" and actions.low == [-0.5, -1.0] and actions.high == [0.5, 1.0]
    assert actions.rest == (0.0, 0.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_the_page_of_continuous_actions(runs: dict[str, Path], browser: Any) -> None:
    with served(runs["continuous"], "--fps", 20) as url:
        page = browser.new_page()
        page.goto(url)
        until(page, "document.getElementById('role').textContent === 'you play'")
        page.focus("#actions input[data-axis='0']")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        assert float(page.inner_text("#actions output")) > 0
        until(page, "Number(document.getElementById('latency').textContent) > 0")
        page.close()


def test_the_page_without_actions_runs_on(runs: dict[str, Path], browser: Any) -> None:
    with served(runs["none"], "--fps", 20) as url:
        page = browser.new_page()
        page.goto(url)
        until(page, "Number(document.getElementById('steps').textContent) > 5")
        assert "just runs on" in page.inner_text("#actions")
        page.close()


def test_the_page_of_tokens_has_a_temperature(runs: dict[str, Path], browser: Any) -> None:
    with served(runs["tokens"], "--fps", 20) as url:
        page = browser.new_page()
        page.goto(url)
        until(page, "document.getElementById('role').textContent === 'you play'")
        assert page.input_value("#temperature") == "1"
        page.focus("#temperature")
        page.keyboard.press("ArrowLeft")
        until(page, "document.getElementById('degrees').textContent === '0.95'")
        until(page, "document.querySelector('.panel .error').textContent.includes('nats')")
        page.close()
