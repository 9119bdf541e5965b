"""A small run to play: four horizons, trained just enough that actions move pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mfwm import HeadsConfig
from mfwm.play.game_loop import GameLoop
from mfwm.play.server import Server
from mfwm.play.world import World
from mfwm.training import train
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons


def trained(folder: Path, steps: int = 40) -> Path:
    """A run on moving_squares, in `folder`."""
    moving_squares(folder / "data")
    config = small_config(folder / "data")
    heads = HeadsConfig(Horizons.cascade(4))
    model = replace(config.model, heads=heads)
    config = replace(config, model=model, steps=steps, clip=16, lr=1e-2, checkpoint_every=steps)
    train(config, folder / "run", progress=False)
    return folder / "run"


@contextmanager
def walking(world: World, *, fps: float = 30.0, **options: Any) -> Iterator[Server]:
    """A server that is not started, and whose thread ends."""
    server = Server(GameLoop(world, fps=fps, seed=0), **options)
    try:
        yield server
    finally:
        server.game.close()
