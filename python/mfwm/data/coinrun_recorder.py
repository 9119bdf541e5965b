"""Records CoinRun, or another procgen game, to standard output: a separate program, run by `mfwm.data.collect`.

procgen pins numpy < 2, which the rest of mfwm does not support, so this file runs in another Python environment that
has procgen and numpy but not mfwm.

The stream is one JSON line that describes the source, then messages: a little-endian header `MESSAGE` (T, H, W, level),
uint8 frames [T, H, W, 3], int64 actions [T], action t taken at frame t, and float32 states [T, S] with S the number of
the description's state_names, if it has any. A header with T = 0 marks the end of the
stream, so that a stream that was cut off is recognised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import struct
import sys
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np

MESSAGE = struct.Struct("<iiiq")
REQUIREMENT = "procgen-mirror==0.10.7"
GAMES = (
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot", "heist", "jumper",
    "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
)  # fmt: skip
NOOP = 4
# Games in which a uniformly random agent is not enough; it does not take actions that are not listed.
WEIGHTS = {
    # It would hardly leave the start of a level, which runs to the right, over obstacles.
    "coinrun": {
        "RIGHT": 0.36, "RIGHT+UP": 0.36, "LEFT": 0.06, "LEFT+UP": 0.06, "UP": 0.05, "NOOP": 0.05, "DOWN": 0.02,
        "RIGHT+DOWN": 0.02, "LEFT+DOWN": 0.02,
    },
    # It would soon walk into a wall, which ends the episode: 34 frames on average, and 53 with these. D throws a ball.
    "dodgeball": {
        "NOOP": 0.33, "D": 0.33, "RIGHT": 0.04, "RIGHT+UP": 0.04, "UP": 0.04, "LEFT+UP": 0.04, "LEFT": 0.04,
        "LEFT+DOWN": 0.04, "DOWN": 0.04, "RIGHT+DOWN": 0.04,
    },
}  # fmt: skip


class HeldActions:
    """Random actions for several environments, drawn with `weights`, each held for a uniform 1 to `repeat` frames."""

    def __init__(self, weights: np.ndarray, repeat: int, environments: int, rng: np.random.Generator) -> None:
        self.weights = weights / weights.sum()
        self.repeat = repeat
        self.rng = rng
        self.left = np.zeros(environments, np.int64)
        self.action = np.zeros(environments, np.int64)

    def next(self) -> np.ndarray:
        """The next action of every environment, int64 [environments]."""
        over = np.flatnonzero(self.left == 0)
        self.action[over] = self.rng.choice(len(self.weights), size=len(over), p=self.weights)
        self.left[over] = self.rng.integers(1, self.repeat + 1, size=len(over))
        self.left -= 1
        return self.action.copy()


def send(stream: BinaryIO, frames: list[np.ndarray], actions: list[int], states: list[np.ndarray], level: int) -> None:
    img = np.stack(frames)
    stream.write(MESSAGE.pack(*img.shape[:3], level))
    stream.write(np.ascontiguousarray(img).data)
    stream.write(np.asarray(actions, np.int64).tobytes())
    stream.write(np.asarray(states, np.float32).tobytes())


def record(
    stream: BinaryIO,
    game: str,
    frames: int,
    seed: int,
    action_repeat: int,
    num_levels: int,
    start_level: int,
    frame_skip: int,
) -> None:
    from procgen import ProcgenGym3Env

    # This file's folder comes last, so that its other modules hide none of Python's.
    sys.path.append(str(Path(__file__).parent))
    from procgen_state import WORLDS, Tracker

    # Fewer games at once for a short recording, because each of them ends with a fragment of an episode.
    environments = max(1, min(16, frames // 500))
    env = ProcgenGym3Env(
        num=environments,
        env_name=game,
        num_levels=num_levels,
        start_level=start_level,
        distribution_mode="easy",
        rand_seed=seed,
    )
    names = ["+".join(keys) or "NOOP" for keys in env.get_combos()]
    weights = [WEIGHTS[game].get(name, 0.0) if game in WEIGHTS else 1.0 for name in names]
    policy = HeldActions(np.array(weights), action_repeat, environments, np.random.default_rng(seed))
    package = REQUIREMENT.split("==")[0]
    description = {
        "action_names": names, "noop": NOOP, "ticks_per_frame": frame_skip, "package": package,
        "package_version": version(package),
    }  # fmt: skip
    trackers = [Tracker(game, frame_skip) for _ in range(environments)] if game in WORLDS else []
    if trackers:
        description |= {"state_names": trackers[0].names, "state_units": trackers[0].units}
    stream.write(json.dumps(description).encode() + b"\n")

    img: list[list[np.ndarray]] = [[] for _ in range(environments)]
    action: list[list[int]] = [[] for _ in range(environments)]
    state: list[list[np.ndarray]] = [[] for _ in range(environments)]
    level = [0] * environments
    sent = waiting = 0
    for tick in itertools.count():
        # `first` marks the first observation of an episode; procgen never returns the last one of the episode before.
        _, observation, first = env.observe()
        info = env.get_info()
        saved = env.callmethod("get_state") if trackers else []
        kept = tick % frame_skip == 0
        if kept:
            taken = policy.next()
        for e in range(environments):
            if first[e]:
                if img[e]:
                    send(stream, img[e], action[e], state[e], level[e])
                    sent, waiting = sent + len(img[e]), waiting - len(img[e])
                img[e], action[e], state[e], level[e] = [], [], [], int(info[e]["level_seed"])
            if trackers:
                if first[e]:
                    trackers[e].reset()
                trackers[e].see(saved[e])
            if kept and sent + waiting < frames:
                img[e].append(observation["rgb"][e].copy())
                action[e].append(int(taken[e]))
                if trackers:
                    state[e].append(trackers[e].state())
                waiting += 1
        if sent + waiting >= frames:
            break
        env.act(taken)
    for e in range(environments):
        if img[e]:
            send(stream, img[e], action[e], state[e], level[e])
    stream.write(MESSAGE.pack(0, 0, 0, 0))
    stream.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a procgen game to standard output.")
    parser.add_argument("game", choices=GAMES)
    for name in ("frames", "seed", "action-repeat", "num-levels", "start-level", "frame-skip"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    # The stream has standard output to itself: what the game and its libraries print goes to standard error.
    stream = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)
    record(stream, **vars(arguments))
    stream.close()


if __name__ == "__main__":
    main()
