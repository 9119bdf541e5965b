"""CoinRun and the other procgen games, in the recorder's own environment: levels are the same by their number."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np

from ..data.procgen import procgen_home
from . import procgen_player
from .engine import Recorded
from .procgen_player import ANSWER


class ProcgenEngine:
    """ImportError where the environment that `mfwm collect` creates does not exist: playing does not create it."""

    def __init__(self, recorded: Recorded) -> None:
        home = procgen_home()
        if not (home / "complete").exists():
            raise ImportError(f"{home} does not exist: mfwm collect {recorded.env} creates it")
        # -I: otherwise the program would import modules from its own folder, or from PYTHONPATH, first.
        command = [str(home / "bin" / "python"), "-I", procgen_player.__file__, recorded.env, str(recorded.ticks)]
        # A session of its own, so that Ctrl-C reaches it through close() alone.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def begin(self, episode: int, level: int) -> np.ndarray:
        return self._answer({"level": level})[0]

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        return self._answer({"action": action})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _answer(self, command: dict[str, Any]) -> tuple[np.ndarray, bool]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        header = self.process.stdout.read(ANSWER.size)
        if len(header) < ANSWER.size:
            raise RuntimeError(f"the game stopped with exit status {self.process.wait()}")
        height, width, over = ANSWER.unpack(header)
        pixels = self.process.stdout.read(height * width * 3)
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3), over
