"""Positions of objects in the procgen games whose view is fixed, read from the games' own saved state.

The recorder imports this file by its path, without mfwm and under numpy < 2, so it imports nothing but numpy.

`get_state` of procgen 0.10.7 returns the bytes that its C++ writes: integers and floats of 4 bytes, strings with their
length before them. `Game::serialize` and `BasicAbstractGame::serialize` give the order; only the objects are read here.
"""

from __future__ import annotations

import struct

import numpy as np

FRAME = 64  # side of procgen's own frames, in pixels
ENTITY = np.dtype(
    [
        (name, kind)
        for kind, names in (
            ("<f4", "x y vx vy rx ry"),
            ("<i4", "type image_type image_theme render_z will_erase collides_with_entities"),
            ("<f4", "collision_margin rotation vrot"),
            ("<i4", "is_reflected fire_time spawn_time life_time expire_time use_abs_coords"),
            ("<f4", "friction"),
            ("<i4", "smart_step avoids_collisions auto_erase"),
            ("<f4", "alpha health theta grow_rate alpha_decay climber_spawn_x"),
        )
        for name in names.split()
    ]
)
# By game: the side of its world, which fills the frame, and its objects: name, types, how many of them are kept.
WORLDS = {
    "bigfish": (20, (("agent", (0,), 1), ("fish", (2,), 24))),
    # An enemy is an egg before it moves.
    "chaser": (11, (("agent", (0,), 1), ("enemy", (4, 6), 3))),
    "dodgeball": (20, (("agent", (0,), 1), ("enemy", (4,), 6), ("ball", (3,), 8), ("enemy_ball", (6,), 8))),
}
# An object is the one that was nearest to it, within this many units of where that one was heading.
REACH = 1.5


def entities(saved: bytes) -> np.ndarray:
    """The objects of a game, in the order in which they appeared."""
    position = 4

    def skip_string() -> None:
        nonlocal position
        position += 4 + struct.unpack_from("<i", saved, position)[0]

    skip_string()  # the game's name
    position += 4 * (12 + 5)  # options; the grid's step, seeds, type and number
    for _ in range(2):  # random number generators
        position += 4
        skip_string()
    position += 4 * (3 + 2 + 4 + 3 + 1 + 2)  # the step's result, action and time-out, levels, reward, assets, time
    _, count = struct.unpack_from("<ii", saved, position)
    return np.frombuffer(saved, ENTITY, count, position + 8)


class Tracker:
    """The state of one game, with a place for every object that it keeps while the object exists.

    Columns are x and y in pixels of procgen's frame, and vx and vy in pixels per recorded frame, y down; NaN where
    there is no object.
    """

    def __init__(self, game: str, frame_skip: int) -> None:
        side, kinds = WORLDS[game]
        self.types = [(types, count) for _, types, count in kinds]
        labels = [name if count == 1 else f"{name}{i}" for name, _, count in kinds for i in range(count)]
        self.names = [f"{label}_{what}" for label in labels for what in ("x", "y", "vx", "vy")]
        self.units = ["pixels", "pixels", "pixels/frame", "pixels/frame"] * len(labels)
        scale = FRAME / side
        # Procgen's y grows upwards.
        self.scale = np.array([scale, -scale, scale * frame_skip, -scale * frame_skip])
        self.origin = np.array([0, side, 0, 0])
        self.places = np.full((len(labels), 4), np.nan)

    def reset(self) -> None:
        self.places[:] = np.nan

    def see(self, saved: bytes) -> None:
        found = entities(saved)
        begin = 0
        for types, count in self.types:
            kept = found[np.isin(found["type"], types) & (found["will_erase"] == 0)]
            now = np.stack([kept[name] for name in ("x", "y", "vx", "vy")], axis=1).astype(np.float64)
            before = self.places[begin : begin + count]
            before[:] = matched(before, now)
            begin += count

    def state(self) -> np.ndarray:
        return ((self.places - self.origin) * self.scale).reshape(-1).astype(np.float32)


def matched(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The objects `now`, each in the place of the one in `before` that it continues, else in a free one."""
    after = np.full_like(before, np.nan)
    heading = before[:, :2] + before[:, 2:]
    distance = np.linalg.norm(heading[:, None] - now[None, :, :2], axis=2)
    distance[~(distance < REACH)] = np.inf
    new = set(range(len(now)))
    while distance.size and np.isfinite(nearest := distance.min()):
        place, number = (int(index[0]) for index in np.nonzero(distance == nearest))
        after[place] = now[number]
        new.discard(number)
        distance[place], distance[:, number] = np.inf, np.inf
    free = np.flatnonzero(np.isnan(after[:, 0]))
    # Objects beyond the number that is kept have no place.
    for place, number in zip(free.tolist(), sorted(new), strict=False):
        after[place] = now[number]
    return after
