"""Plays a procgen game by commands: a separate program, run by game_procgen.py in the environment of the recorder.

Each line of standard input is a command in JSON: {"level": L} begins that level, {"action": a} repeats an action for
`ticks` ticks. The answer is a little-endian header ANSWER (height, width, whether the episode is over) and the frame,
uint8 [H, W, 3].
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import Any

import numpy as np

ANSWER = struct.Struct("<ii?3x")


def play(game: str, ticks: int) -> None:
    from procgen import ProcgenGym3Env

    # Standard output is for the answers: what the game prints goes to standard error.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    env: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        over = False
        if "level" in command:
            if env is not None:
                env.close()
            env = ProcgenGym3Env(
                num=1, env_name=game, num_levels=1, start_level=command["level"], distribution_mode="easy", rand_seed=0
            )
        else:
            for _ in range(ticks):
                env.act(np.array([command["action"]], np.int32))
                _, _, first = env.observe()
                over = over or bool(first[0])
        _, observation, _ = env.observe()
        frame = np.ascontiguousarray(observation["rgb"][0])
        stream.write(ANSWER.pack(*frame.shape[:2], over))
        stream.write(frame.data)
        stream.flush()


if __name__ == "__main__":
    play(sys.argv[1], int(sys.argv[2]))
