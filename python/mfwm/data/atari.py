"""Atari games for `mfwm collect`, with the positions of objects in Freeway, Pong and Breakout.

Positions are read from the console's RAM. Each is a byte times a factor plus an offset, which were fitted to the pixels
of the 160 x 210 screen. A recorded frame is the maximum of two ticks, so an object is drawn at two places where it
moves, and its position is the mean of both: the middle of what is seen, within about a pixel of that screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from .coinrun_recorder import HeldActions
from .recording import Episode, Recording

WIDTH, HEIGHT = 160, 210
TICKS = 4
JUMP = 20  # pixels in a tick; Pong's paddle moves by up to 10


class Position(NamedTuple):
    """A coordinate of an object's middle, in pixels of the screen: factor * RAM[address] + offset."""

    name: str
    address: int
    factor: int
    offset: float


class Follow(NamedTuple):
    """Which coordinates of paddle and ball are to meet, and the actions that raise and lower the paddle's."""

    paddle: str
    ball: str
    more: str
    less: str


@dataclass(frozen=True)
class Known:
    """What is known of a game.

    field: the playing field on the screen: first row, end row, first column, end column.
    weights: of actions that are not drawn like the others.
    follow: how the paddle follows the ball, which it does half of the time, so that rallies last.
    """

    field: tuple[int, int, int, int]
    positions: tuple[Position, ...]
    weights: dict[str, float]
    follow: Follow | None = None

    def state(self, ram: np.ndarray) -> np.ndarray:
        """float64 [S] at a tick, in pixels of the screen; NaN for a ball that is not drawn."""
        found = np.array([p.factor * float(ram[p.address]) + p.offset for p in self.positions])
        names = [p.name for p in self.positions]
        if "ball_y" in names and not self.field[0] <= found[names.index("ball_y")] <= self.field[1]:
            found[[names.index("ball_x"), names.index("ball_y")]] = np.nan
        return found

    def mean_state(self, before: np.ndarray, ram: np.ndarray) -> np.ndarray:
        """The mean over two ticks. What jumps, such as a car from one side to the other, is where it is now."""
        first, last = self.state(before), self.state(ram)
        return np.where(np.abs(last - first) <= JUMP, (first + last) / 2, np.where(np.isnan(last), first, last))

    def scale(self, size: int, field: bool) -> tuple[np.ndarray, np.ndarray]:
        """(origin, scale) of each coordinate: (state - origin) * scale is in pixels of the recorded frame."""
        top, bottom, left, right = self.field if field else (0, HEIGHT, 0, WIDTH)
        x = np.array([p.name.endswith("_x") for p in self.positions])
        return np.where(x, left, top), size / np.where(x, right - left, bottom - top)


# Cars, from the top lane down. The upper five drive left and are drawn a tick late, so right of where they are by their
# speed: a pixel in 5, 4, 3, 2 ticks and 1.
LATE = (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1, 0, 0, 0, 0, 0)
CARS = tuple(
    position
    for lane in range(10)
    for position in (
        Position(f"car{lane}_x", 117 - lane, 1, 1.0 + LATE[lane]),
        Position(f"car{lane}_y", 0, 0, 32.0 + 16 * lane),
    )
)
KNOWN = {
    "Freeway": Known(
        (15, 195, 8, 160),
        (Position("chicken_x", 0, 0, 47.5), Position("chicken_y", 14, -1, 197.0), *CARS),
        # An even choice would leave the chicken at the kerb.
        {"UP": 3.0},
    ),
    "Pong": Known(
        (34, 194, 0, 160),
        (
            Position("ball_x", 49, 1, -48.0),
            Position("ball_y", 54, 1, -12.0),
            Position("player_x", 0, 0, 142.0),
            Position("player_y", 51, 1, -5.5),
            Position("enemy_x", 0, 0, 18.0),
            Position("enemy_y", 50, 1, -7.0),
        ),
        {},
        Follow("player_y", "ball_y", more="LEFT", less="RIGHT"),
    ),
    "Breakout": Known(
        (32, 196, 8, 152),
        (
            Position("ball_x", 99, 1, -48.0),
            Position("ball_y", 101, 1, 11.0),
            Position("paddle_x", 72, 1, -39.0),
            Position("paddle_y", 0, 0, 191.0),
        ),
        {},
        Follow("paddle_x", "ball_x", more="RIGHT", less="LEFT"),
    ),
}


def console(env: str, seed: int) -> Any:
    """An ALEInterface with the game of `env`, "atari:<Game>", in it."""
    try:
        from ale_py import ALEInterface, LoggerMode, roms
    except ImportError as error:
        raise ImportError("Atari needs the package ale-py: pip install 'mfwm-kernels[data]'") from error
    ALEInterface.setLoggerMode(LoggerMode.Error)
    game = env.partition(":")[2]
    titles = {"".join(part.capitalize() for part in rom.split("_")): rom for rom in roms.get_all_rom_ids()}
    if game not in titles:
        raise ValueError(f"env must be atari:<Game> with one of {', '.join(sorted(titles))}; got {env!r}")
    ale = ALEInterface()
    ale.setInt("random_seed", seed)
    # The default, 0.25, sometimes repeats the last action instead, so the recorded action would not be the one taken.
    ale.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path(titles[game])
    assert rom is not None
    ale.loadROM(rom)
    return ale


def field_of(env: str, field: bool) -> tuple[int, int, int, int]:
    """What of the screen is recorded: first row, end row, first column, end column."""
    known = KNOWN.get(env.partition(":")[2])
    return known.field if field and known else (0, HEIGHT, 0, WIDTH)


def atari_episodes(env: str, recording: Recording) -> Iterator[Any]:
    ale = console(env, recording.seed)
    known = KNOWN.get(env.partition(":")[2])
    legal = ale.getMinimalActionSet()
    names = [action.name for action in legal]
    ticks = TICKS * recording.frame_skip
    description = {
        "action_names": names, "noop": 0, "ticks_per_frame": ticks, "package": "ale-py",
        "package_version": version("ale-py"), "field": recording.field,
    }  # fmt: skip
    if known is not None:
        description["state_names"] = [p.name for p in known.positions]
        description["state_units"] = ["pixels"] * len(known.positions)
    yield description
    policy = Policy(known, names, recording)
    top, bottom, left, right = field_of(env, recording.field)
    frames = recording.frames
    while frames > 0:
        ale.reset_game()
        img, action, states = [], [], []
        before = screen = ale.getScreenRGB()
        ram_before = ram = ale.getRAM()
        while not ale.game_over() and frames > 0:
            state = known.mean_state(ram_before, ram) if known is not None else None
            taken = policy.next(state)
            # The console draws some objects on every other tick only, so take the maximum of two, as is usual.
            img.append(np.maximum(before, screen)[top:bottom, left:right])
            action.append(taken)
            states.append(state)
            for _ in range(ticks):
                ale.act(legal[taken])
                before, screen = screen, ale.getScreenRGB()
                ram_before, ram = ram, ale.getRAM()
            frames -= 1
        scaled = None
        if known is not None:
            origin, scale = known.scale(recording.size, recording.field)
            scaled = ((np.stack(states) - origin) * scale).astype(np.float32)  # type: ignore[arg-type]
        yield Episode(np.stack(img), np.array(action), None, scaled)


class Policy:
    """Random actions, each held for 1 to action_repeat frames; half of the time, a paddle follows the ball instead."""

    def __init__(self, known: Known | None, names: list[str], recording: Recording) -> None:
        weights = [known.weights.get(name, 1.0) if known else 1.0 for name in names]
        rng = np.random.default_rng(recording.seed)
        self.random = HeldActions(np.array(weights), recording.action_repeat, 1, rng)
        self.followed = HeldActions(np.ones(2), recording.action_repeat, 1, rng)
        self.follow = known.follow if known else None
        self.columns = [p.name for p in known.positions] if known else []
        self.names = names

    def next(self, state: np.ndarray | None) -> int:
        taken = int(self.random.next()[0])
        if self.follow is None or state is None or not self.followed.next()[0]:
            return taken
        paddle, ball = (state[self.columns.index(name)] for name in self.follow[:2])
        if np.isnan(ball):
            return taken
        # Within two pixels of it, the paddle waits.
        return self.names.index(
            "NOOP" if abs(ball - paddle) < 2 else self.follow.more if ball > paddle else self.follow.less
        )
