"""mfwm play: walk through the learned world of a run in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mfwm_kernels import arguments as check

if TYPE_CHECKING:
    from .world import World


@dataclass
class Play:
    """Walk through a run's learned world in a browser, and see what it expects one, two, four and eight frames ahead.

    Prints a URL with a token, and opens it. Ctrl-C stops.
    """

    run_directory: tyro.conf.Positional[Path]
    host: str = "127.0.0.1"
    """The address to listen at; others than this machine's own can be reached by whoever has the token."""
    port: int = 0
    """0: any that is free."""
    fps: float = 15.0
    """Frames per second, at most."""
    browser: bool = True
    """Open the URL."""
    seed: int = 0
    """Of the starts, the random policy, and tokens and frames that are drawn."""
    game: bool = True
    """Show the real game beside the model, where it is installed."""
    export: Path | None = None
    """Write a page of recorded walks to this file instead, which needs no server."""
    data: str | None = None
    """Where the run's data set is, if it was moved."""
    pixels: str | None = None
    """For a run on tokens: where the frames are that they were encoded from, if they were moved."""
    tokenizer: Path | None = None
    """For a run on tokens: where the run of their tokenizer is, if it was moved."""

    def run(self) -> None:
        check.integer("seed", self.seed, least=0)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in 0..65535, got {self.port}")
        if not 0.1 <= self.fps <= 120:
            raise ValueError(f"fps must be in 0.1..120, got {self.fps}")
        from .world import load_world

        world = load_world(self.run_directory, data=self.data, pixels=self.pixels, tokenizer=self.tokenizer)
        if world.step < world.config.steps:
            print(f"play: {self.run_directory} was trained for {world.step} of {world.config.steps} steps so far")
        if self.export is not None:
            from .export import export

            export(world, self.export, seed=self.seed)
            print(f"play: {self.export}")
        else:
            self._serve(world)

    def _serve(self, world: World) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ImportError("mfwm play needs the package aiohttp: pip install 'mfwm-kernels[play]'") from error
        import asyncio
        import gc

        from .game_loop import GameLoop
        from .real_game import real_game
        from .server import Server, serve

        game = real_game(world) if self.game else None
        loop = GameLoop(world, fps=self.fps, seed=self.seed, game=game)
        asyncio.run(serve(Server(loop), host=self.host, port=self.port, browser=self.browser))
        # The collection at Python's exit goes through all objects of torch, which took 3 s on a busy machine.
        gc.freeze()
