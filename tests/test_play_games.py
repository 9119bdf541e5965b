"""The real game beside the model: it plays recorded episodes again exactly, follows the keys, and is recorded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import chromium, served, until
from mfwm.data import Replay
from mfwm.data.check import check
from mfwm.data.collect import collect
from mfwm.data.procgen import procgen_home
from mfwm.data.recording import Balls
from mfwm.play import protocol
from mfwm.play.actions import Actions
from mfwm.play.beside import Beside
from mfwm.play.game_loop import GameLoop
from mfwm.play.real_game import RealGame, real_game
from mfwm.play.starts import Start, choose_starts
from mfwm.play.world import World, load_world
from mfwm.training import train
from small_run import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on balls, whose real game is always at hand."""
    folder = tmp_path_factory.mktemp("balls")
    collect("balls", 1100, folder / "data", size=16, seed=3, progress=False)
    config = small_config(folder / "data")
    train(replace(config, steps=1, model=replace(config.model, actions=5)), folder / "run", progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def world(run: Path) -> World:
    return load_world(run)


def playing(path: Path) -> RealGame:
    """The game of a set."""
    replay = Replay(path)
    actions = Actions("discrete", [""] * int(replay.actions or 0))
    world: Any = SimpleNamespace(replay=replay, pictures=replay, size=replay.frame[1:], actions=actions)
    game = real_game(world)
    assert game is not None
    return game


def skip_unless_installed(env: str) -> None:
    if env == "coinrun":
        if not (procgen_home() / "complete").exists():
            pytest.skip("needs procgen, in the environment that mfwm collect creates")
    elif env != "balls":
        pytest.importorskip({"atari": "ale_py", "doom": "vizdoom"}[env.partition(":")[0]])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "balls": ("balls", {"frame_skip": 2}),
    "balls, textured": ("balls", {"balls": Balls(2, texture=True)}),
    "pong": ("atari:Pong", {}),
    "breakout, cropped": ("atari:Breakout", {"field": True}),
    "doom": ("doom:basic", {}),
    "coinrun": ("coinrun", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_episodes_are_played_again_exactly(tmp_path: Path, name: str) -> None:
    env, options = CASES[name]
    skip_unless_installed(env)
    collect(env, 600, tmp_path / "set", size=48, seed=2, progress=False, **options)
    game = playing(tmp_path / "set")
    replay = game.world.replay
    try:
        # A later episode first, and then earlier ones, for which Doom starts anew.
        for episode in range(min(3, replay.episodes))[::-1]:
            first, length = int(replay.episode_starts[episode]), int(replay.episode_lengths[episode])
            last = first + min(length, 40) - 1
            assert game.start(Start(episode, first, last)), episode
            count = len(game.frames)
            assert np.array_equal(np.stack(game.frames), replay.video[last - count + 1 : last + 1])
            assert list(game.actions) == replay.action[last - count + 1 : last].tolist()
    finally:
        game.engine.close()


def test_a_start_that_the_game_does_not_show(world: World) -> None:
    game = real_game(world)
    assert game is not None
    start = choose_starts(world, np.random.default_rng(0))[0]
    assert game.start(start)
    # Another level's frames are not those of this start.
    assert not game.start(replace(start, episode=(start.episode + 1) % world.replay.episodes))


@pytest.mark.parametrize(
    ("name", "value"), [("env", "squares"), ("env", None), ("seed", None), ("ticks_per_frame", "2")]
)
def test_there_is_no_game_for_other_sets(world: World, monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(world.pictures, "attributes", {**world.pictures.attributes, name: value})
    assert real_game(world) is None


def test_an_episode_that_is_over_stays(world: World) -> None:
    class Engine:
        def begin(self, episode: int, level: int) -> np.ndarray:
            return np.zeros((16, 16, 3), np.uint8)

        def step(self, action: int) -> tuple[np.ndarray, bool]:
            return np.full((16, 16, 3), 255, np.uint8), action == 4

        def close(self) -> None:
            pass

    game = RealGame(world, Engine())
    assert not game.start(Start(0, 0, 0)) and not game.over
    game.step(1)
    assert game.frame.mean() == 255 and game.error(np.zeros((16, 16, 3), np.uint8)) == pytest.approx(4)
    game.step(4)
    game.step(1)
    assert game.over and np.isnan(game.error(game.frame)) and list(game.actions) == [1]


# ---- in the loop


def turn(world: World, scene: Any) -> None:
    async def run() -> None:
        loop = GameLoop(world, fps=1000, seed=0, game=real_game(world))
        loop.paused = True
        try:
            await loop._turn()
            assert loop.beside.started is not None
            await loop.beside.started
            await scene(loop)
        finally:
            loop.close()

    asyncio.run(run())


def test_the_game_takes_the_same_actions_and_is_recorded(world: World) -> None:
    async def scene(loop: GameLoop) -> None:
        loop.record_game, loop.record_wanted = True, True
        await loop._turn()
        taken = []
        for action in (1, 1, 2, 2, 3, 3, 4, 4):
            loop.action, loop.steps_wanted = action, 1
            await loop._turn()
            taken.append(action)
        await loop.record(False)
        path = Path(loop.notice.split(": ")[1].split(" and ")[0])
        replay = Replay(path)
        assert check(path, 4) == [] and replay.attributes["recorded_from"] == "game"
        assert replay.action.tolist() == [*taken, 0]
        # The frames are those of the game that begins there and gets these actions.
        again = real_game(world)
        assert again is not None and loop.start is not None and again.start(loop.starts[loop.start])
        frames = [again.frame]
        for action in taken:
            again.step(action)
            frames.append(again.frame)
        assert np.array_equal(replay.video, np.stack(frames))

    turn(world, scene)


def test_the_model_is_put_where_the_game_is(world: World) -> None:
    async def scene(loop: GameLoop) -> None:
        game = loop.beside.game
        assert game is not None and loop.moment is not None
        for _ in range(12):
            loop.action, loop.steps_wanted = 1, 1
            await loop._turn()
        assert loop.moment.step == 12 and game.error(loop.moment.frame) > 0
        loop.sync_wanted = True
        await loop._turn()
        assert loop.moment.step == 0 and np.array_equal(loop.moment.frame, game.frame)
        assert game.error(loop.moment.frame) == 0

    turn(world, scene)


def late_game(world: World) -> tuple[RealGame, threading.Event]:
    """A game that begins when the event is set."""
    game, free = real_game(world), threading.Event()
    assert game is not None
    begin = game.engine.begin

    def slow(episode: int, level: int) -> np.ndarray:
        free.wait(20)
        return begin(episode, level)

    game.engine.begin = slow  # type: ignore[method-assign]
    return game, free


def test_a_game_that_begins_late_is_shown_while_it_is_paused(world: World) -> None:
    game, free = late_game(world)

    async def run() -> None:
        loop = GameLoop(world, fps=1000, seed=0, game=game)
        loop.paused = True
        try:
            await loop._turn()
            assert loop.packed is not None and not loop.packed[1] & protocol.GAME and not loop._has_work()
            free.set()
            assert loop.beside.started is not None and await loop.beside.started
            await asyncio.sleep(0)
            assert loop.game_begun and loop._has_work()
            await loop._turn()
            assert loop.packed[1] & protocol.GAME and not loop._has_work()
        finally:
            loop.close()

    asyncio.run(run())


def test_the_model_meets_a_game_that_is_elsewhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a recording skipped frames, so that an episode begins between two of them."""
    monkeypatch.setattr("mfwm.play.real_game.SAME", -1.0)

    async def scene(loop: GameLoop) -> None:
        game, beside = loop.beside.game, loop.beside
        assert game is not None and loop.moment is not None and not beside.in_step
        assert beside.notice == "The real game could not be brought to this start."
        assert await beside.seen(loop.moment.frame) is None
        loop.sync_wanted = True
        await loop._turn()
        assert beside.in_step and beside.notice == "" and np.array_equal(loop.moment.frame, game.frame)
        loop.start_wanted = 0
        await loop._turn()
        assert beside.started is not None and not await beside.started and not beside.in_step

    turn(world, scene)


def test_a_game_that_fails_is_dropped(world: World) -> None:
    async def scene(loop: GameLoop) -> None:
        game = loop.beside.game
        assert game is not None

        def fail(action: int) -> None:
            raise RuntimeError("the game stopped with exit status 1")

        game.step = fail  # type: ignore[method-assign]
        for _ in range(2):
            loop.steps_wanted = 1
            await loop._turn()
        assert loop.beside.game is None and "exit status 1" in loop.beside.failed
        assert loop.moment is not None and loop.moment.step == 2

    turn(world, scene)


def test_a_slow_start_holds_nothing_up(world: World) -> None:
    async def run() -> None:
        game, free = late_game(world)
        beside, picture = Beside(game), np.zeros((16, 16, 3), np.uint8)
        begun: list[bool] = []
        beside.start(choose_starts(world, np.random.default_rng(0))[0], lambda: begun.append(True))
        for _ in range(5):
            beside.step(1)
            assert await beside.seen(picture) is None and not begun
        free.set()
        assert beside.started is not None and await beside.started
        await asyncio.sleep(0)
        assert begun
        seen = await beside.seen(picture)
        assert seen is not None and list(game.actions) == [1, 1, 1]
        beside.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_the_page_shows_both(run: Path, browser: Any) -> None:
    with served(run, "--fps", 20) as url:
        page = browser.new_page()
        page.goto(url)
        until(page, "!document.getElementById('beside').hidden")
        until(page, "document.getElementById('game-error').textContent.includes('off by')")
        page.keyboard.press("KeyP")
        until(page, "document.getElementById('pause').getAttribute('aria-pressed') === 'true'")
        page.click("#sync")
        until(page, "document.getElementById('steps').textContent === '0'")
        picture = "(c) => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).join()"
        assert page.eval_on_selector("#frame", picture) == page.eval_on_selector("#game", picture)
        page.close()
    with served(run, "--fps", 20, "--no-game") as url:
        page = browser.new_page()
        page.goto(url)
        until(page, "Number(document.getElementById('steps').textContent) > 3")
        assert page.is_hidden("#beside") and page.is_hidden("#sync")
        page.close()
