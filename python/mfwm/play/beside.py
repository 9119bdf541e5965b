"""The real game in a thread of its own, which follows the model's steps without holding them up while it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .protocol import GameFrame
from .real_game import RealGame
from .starts import Start


class Beside:
    """`start` and `step` queue what the game is to do; `seen` gives its frame once it has caught up.

    A game whose engine fails is dropped, with the reason in `failed`.
    """

    def __init__(self, game: RealGame | None) -> None:
        self.game = game
        self.failed = ""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mfwm-game")
        self.started: asyncio.Future[bool] | None = None
        self.newest: asyncio.Future[Any] | None = None
        # The model was put where the game is, which need not be where the start was.
        self.met = False

    def start(self, start: Start, begun: Callable[[], None]) -> None:
        """Begin at a start; `begun` is called when the game has."""
        if self.game is not None:
            self.started = self.newest = self._queued(self.game.start, start)
            self.started.add_done_callback(lambda _: begun())
            self.met = False

    def step(self, action: Any) -> None:
        if self.game is not None and self.started is not None:
            self.newest = self._queued(self.game.step, action)

    async def seen(self, picture: np.ndarray) -> GameFrame | None:
        """The game's frame beside the model's `picture`. None while the game starts, and where it is not at the start
        that the model was given."""
        if not self.in_step:
            return None
        assert self.newest is not None
        try:
            await self.newest
        except Exception as error:  # An engine may raise anything.
            self._drop(error)
        return None if self.game is None else GameFrame(self.game.frame, self.game.error(picture))

    @property
    def has_begun(self) -> bool:
        """Whether the game has reached the start. One that failed on the way is dropped."""
        if self.game is None or self.started is None or not self.started.done():
            return False
        if (error := self.started.exception()) is not None:
            self._drop(error)
            return False
        return True

    @property
    def ready(self) -> bool:
        """Whether the game has begun and its episode is not over."""
        return self.has_begun and self.game is not None and not self.game.over

    @property
    def in_step(self) -> bool:
        """Whether the game began at the frame that the model began at."""
        return self.has_begun and self.started is not None and (self.met or self.started.result())

    @property
    def notice(self) -> str:
        """Why no game is shown, if one is installed."""
        if self.failed or self.game is None or self.started is None or not self.started.done() or self.in_step:
            return self.failed
        return "The real game could not be brought to this start."

    def close(self) -> None:
        if self.game is not None:
            self.game.engine.close()
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _queued(self, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        queued = asyncio.get_running_loop().run_in_executor(self.thread, call, *arguments)
        # Retrieve the error here, or asyncio logs it where no frame is wanted later.
        queued.add_done_callback(lambda done: done.cancelled() or done.exception())
        return queued

    def _drop(self, error: BaseException) -> None:
        if self.game is not None:
            self.failed = f"The real game stopped: {error}"
            self.game.engine.close()
        self.game = None
