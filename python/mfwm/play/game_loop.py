"""The paced loop of a walk: takes the newest input at every tick, computes in one thread, shows everyone the result."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from . import protocol
from .beside import Beside
from .clients import Client, Room
from .policy import RandomPolicy
from .real_game import RealGame
from .recorder import Recorder, write
from .session import Moment, Session
from .starts import Start, choose_starts, picture_of
from .world import World, describe

# Single steps that may wait, so that they end soon after the key is released.
MOST_STEPS = 4
Result = TypeVar("Result")


class GameLoop:
    """One walk, its inputs, and the clients that see it.

    Inputs are fields that messages overwrite, so that the newest wins, and `run` reads them at every tick. All
    computing is done by one thread, one call at a time, and the event loop stays free.

    game: the real game to show beside the model, if there is one.
    """

    def __init__(self, world: World, *, fps: float, seed: int, game: RealGame | None = None) -> None:
        self.world, self.fps, self.seed = world, fps, seed
        self.rng = np.random.default_rng(seed)
        self.session = Session(world, seed)
        self.policy = RandomPolicy(world.actions, seed)
        self.starts: list[Start] = choose_starts(world, self.rng)
        self.thumbnails = protocol.pack_starts([picture_of(world.pictures, start) for start in self.starts])
        self.beside = Beside(game)
        self.recorder = Recorder(world)
        self.room = Room()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mfwm-play")
        self.wake, self.pressed = asyncio.Event(), asyncio.Event()
        # Inputs. `number` counts those that change what is computed, so that the page can time them.
        self.action: Any = world.actions.rest
        self.number = 0
        self.paused = self.random = False
        self.steps_wanted = 0
        self.start_wanted: int | None = int(self.rng.integers(len(self.starts)))
        self.temperature_wanted: float | None = None
        self.record_wanted: bool | None = None
        self.record_game = self.sync_wanted = False
        # The game has begun, which may take seconds, and is not shown yet.
        self.game_begun = False
        # Results: the start, the moment, the input and the plan that it was computed with, and as it was sent.
        self.start = self.start_wanted
        self.moment: Moment | None = None
        self.plan_shown: list[Any] = []
        self.packed: bytes | None = None
        self.notice = self.told = ""

    def close(self) -> None:
        """End the threads and the real game."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.beside.close()

    # ---- inputs

    def join(self, client: Client) -> None:
        """Add a client. It first gets the world and the thumbnails, then what is shown."""
        self.room.enter(client, time.monotonic())
        client.first = [json.dumps({"kind": "world", **describe(self.world)}), self.thumbnails]
        if self.packed is not None:
            client.show(self.packed)
        self.announce()

    def part(self, client: Client) -> None:
        """Remove a client. Keys that the player held are released."""
        if client is self.room.player:
            self.action, self.number = self.world.actions.rest, 0
        self.room.leave(client, time.monotonic())
        self.announce()

    def take(self, client: Client, message: dict[str, Any]) -> None:
        """Apply a message that protocol.parsed returned. What a viewer sends has no effect, but for asking.

        ValueError where the model has no such action, start or temperature.
        """
        now = time.monotonic()
        if message["kind"] == "ask":
            self.room.ask(client, now)
        elif client is self.room.player:
            self.room.touch(now)
            self._take(message, now)
        self.announce()

    def _take(self, message: dict[str, Any], now: float) -> None:
        kind = message["kind"]
        if kind == "act":
            self.action, self.number = self.world.actions.checked(message["action"]), message["number"]
            # A key that is pressed takes over from the random policy.
            self.random = self.random and self.action == self.world.actions.rest
            self.pressed.set()
        elif kind == "pause":
            self.paused, self.steps_wanted = message["on"], 0
        elif kind == "step":
            self.paused, self.steps_wanted = True, min(self.steps_wanted + 1, MOST_STEPS)
        elif kind == "reset":
            start = message["start"]
            if start is not None and not 0 <= start < len(self.starts):
                raise ValueError(f"reset: start must be in 0..{len(self.starts) - 1}")
            self.start_wanted = int(self.rng.integers(len(self.starts))) if start is None else start
        elif kind == "random":
            self.random = message["on"]
        elif kind == "temperature":
            if not self.world.samples:
                raise ValueError("temperature: this model draws nothing")
            self.temperature_wanted = float(message["value"])
        elif kind == "record":
            self.record_wanted = message["on"]
        elif kind == "source":
            self.record_game = message["game"]
        elif kind == "sync":
            self.sync_wanted = True
        elif kind == "give":
            self.room.give(now)

    # ---- messages to the browsers

    def announce(self) -> None:
        """Tell every client the state, and wake the loop."""
        shared = {
            "paused": self.paused,
            "random": self.random,
            "recording": self.recorder.on,
            "recorded": self.recorder.frames if self.recorder.on else 0,
            "start": self.start,
            "temperature": self.session.temperature,
            "viewers": len(self.room.clients) - 1,
            "asking": len(self.room.asking),
            "notice": self.notice or self.beside.notice,
            "game": self.beside.game is not None,
            "record_game": self.record_game,
        }
        for client in self.room.clients:
            player, asked = client is self.room.player, client in self.room.asking
            client.tell({**shared, "player": player, "asked": asked})
        self.wake.set()

    async def _show(self, moment: Moment, number: int, began: float) -> None:
        self.moment, self.game_begun = moment, False
        beside = await self.beside.seen(moment.frame)
        if self.beside.notice != self.told:
            self.told = self.beside.notice
            self.announce()
        milliseconds = 1000 * (time.perf_counter() - began)
        self.packed = protocol.pack(moment, number=number, milliseconds=milliseconds, game=beside)
        for client in self.room.clients:
            client.show(self.packed)

    # ---- the loop

    async def run(self) -> None:
        """Step at every tick, until cancelled. Nothing is computed while nobody watches."""
        loop = asyncio.get_running_loop()
        tick = loop.time()
        while True:
            if not (self.room.clients and self._has_work()):
                self.wake.clear()
                await self.wake.wait()
                continue
            # While paused, requests are served at once, not at the next tick.
            if not self.paused:
                await self._until(tick)
            tick = max(tick + 1 / self.fps, loop.time())
            await self._turn()

    async def _until(self, tick: float) -> None:
        """Wait for the tick, or from half a frame before it for another key, which then takes up to half a frame less
        to be seen. The next tick stays where it is, and so does the pace."""
        now = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, tick - 0.5 / self.fps - now()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(max(tick, now())):
                await self.pressed.wait()

    def _has_work(self) -> bool:
        asked = (self.start_wanted, self.temperature_wanted, self.record_wanted)
        if (
            not self.paused
            or self.steps_wanted
            or self.sync_wanted
            or self.game_begun
            or any(value is not None for value in asked)
        ):
            return True
        return self.plan_shown != self._plan()

    def _plan(self) -> list[Any]:
        """The actions from the frame shown on, as far as they are known: the key that is held stays held."""
        longest = self.session.longest
        return self.policy.plan(longest) if self.random else [self.action] * longest

    async def _turn(self) -> None:
        """What the inputs ask for now: a reset, a step, or another look."""
        began, number = time.perf_counter(), self.number
        self.pressed.clear()
        if self.temperature_wanted is not None:
            self.session.heat(self.temperature_wanted)
            self.temperature_wanted = None
            self.announce()
        if self.record_wanted is not None:
            wanted, self.record_wanted = self.record_wanted, None
            await self.record(wanted)
        if self.start_wanted is not None:
            self.start, self.start_wanted = self.start_wanted, None
            start = self.starts[self.start]
            self._cut()
            self.beside.start(start, self._show_game)
            await self._compute(lambda plan: self.session.reset(start, plan), number, began)
            self.announce()
        elif self.sync_wanted:
            self.sync_wanted = False
            await self._synchronise(number, began)
        elif not self.paused or self.steps_wanted:
            self.steps_wanted = max(0, self.steps_wanted - 1)
            await self._step(number, began)
        elif self.plan_shown != self._plan():
            await self._compute(self.session.look, number, began)
        elif self.game_begun and self.moment is not None:
            await self._show(self.moment, number, began)

    async def _step(self, number: int, began: float) -> None:
        action = self.policy.next() if self.random else self.action
        if self.recorder.on and (frame := self._recorded_frame()) is not None:
            self.recorder.add(frame, action)
        self.beside.step(action)
        await self._compute(lambda plan: self.session.step(action, plan), number, began)
        if self.recorder.on and self.recorder.full:
            await self.record(False)

    def _show_game(self) -> None:
        self.game_begun = True
        self.wake.set()

    async def _synchronise(self, number: int, began: float) -> None:
        """Put the model where the game is: it starts again from the game's last frames."""
        game = self.beside.game
        if game is None or not self.beside.ready:
            self.notice = "The game shows nothing to start from: choose a start."
            self.announce()
            return
        self.beside.met = True
        if self.recorder.source == "model":
            self._cut()
        frames, actions = np.stack(game.frames), list(game.actions)
        await self._compute(lambda plan: self.session.begin_at(frames, actions, plan), number, began)

    def _recorded_frame(self) -> np.ndarray | None:
        """The frame that is shown, of the model or of the game, as is recorded; None where there is none."""
        if self.recorder.source == "model":
            return None if self.moment is None else self.moment.frame
        game = self.beside.game
        return game.frame if game is not None and self.beside.in_step and not game.over else None

    def _cut(self) -> None:
        """End the episode that is recorded."""
        if self.recorder.on:
            self.recorder.cut(self._recorded_frame())

    async def _compute(self, moment_of: Callable[[list[Any]], Moment], number: int, began: float) -> None:
        plan = self._plan()
        moment = await self._in_thread(lambda: moment_of(plan))
        self.plan_shown = plan
        await self._show(moment, number, began)

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.thread, call)

    async def record(self, on: bool) -> None:
        """Begin a recording, or end it and write it."""
        if on and not self.recorder.on:
            self.recorder.begin("game" if self.record_game and self.beside.game is not None else "model")
            self.notice = ""
        elif not on and self.recorder.on:
            self._cut()
            await self._write()
        self.announce()

    async def _write(self) -> None:
        source, episodes = self.recorder.source, self.recorder.taken()
        if not episodes:
            self.notice = "Nothing was recorded: no step was taken."
            return
        frames = sum(len(shown) for shown, _ in episodes)
        try:
            path = await self._in_thread(lambda: write(self.world, source, episodes, self.fps))
        except (OSError, ValueError) as error:
            # The frames are kept, and ending the recording again writes them again.
            self.recorder.resume(episodes)
            self.notice = f"The recording could not be written: {error}"
        else:
            self.notice = f"{frames} frames recorded: {path} and {path.name}.gif"
        print(f"play: {self.notice}")
