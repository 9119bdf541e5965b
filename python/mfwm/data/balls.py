"""balls: coloured balls that bounce off the walls of a box and off one another, one of them pushed by the action.

A world whose state and dials are all known: positions and velocities are kept beside the frames, and noise, texture,
speed and number of balls are options. Ball 0, the white one, is pushed right, up, left or down, or not at all.

Lengths are in sides of the box, which fills the frame: x to the right, y down, and times are in frames of frame_skip 1.
All balls have the same radius and mass and collide elastically, without friction. The motion is computed from one
impact to the next, so it is exact: no balls overlap, and impacts between balls conserve energy and momentum to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from .coinrun_recorder import HeldActions
from .recording import Balls, Episode, Recording

RADIUS = 0.1
COLORS = np.array(
    [(255, 255, 255), (235, 64, 52), (70, 200, 80), (80, 130, 255), (250, 210, 50), (220, 90, 220)], np.float32
)
ACTIONS = {"NOOP": (0, 0), "RIGHT": (1, 0), "UP": (0, -1), "LEFT": (-1, 0), "DOWN": (0, 1)}
EPISODE_FRAMES = 256
BACKGROUND = 24.0


class Box:
    """The balls in motion: lists of x, y, vx and vy, one entry per ball."""

    def __init__(self, options: Balls, rng: np.random.Generator) -> None:
        self.push, self.limit = options.speed / 2, options.speed * 2
        self.x: list[float] = []
        self.y: list[float] = []
        while len(self.x) < options.count:
            x, y = rng.uniform(RADIUS, 1 - RADIUS, 2).tolist()
            if all(math.hypot(x - a, y - b) > 2 * RADIUS for a, b in zip(self.x, self.y, strict=True)):
                self.x.append(x)
                self.y.append(y)
        speed = options.speed * rng.uniform(0.5, 1.5, options.count)
        angle = rng.uniform(0, 2 * math.pi, options.count)
        self.vx: list[float] = (speed * np.cos(angle)).tolist()
        self.vy: list[float] = (speed * np.sin(angle)).tolist()
        self.pairs = list(combinations(range(options.count), 2))

    def state(self) -> list[float]:
        """x, y, vx, vy of ball 0, of ball 1, ..."""
        return [value for ball in zip(self.x, self.y, self.vx, self.vy, strict=True) for value in ball]

    def step(self, direction: tuple[int, int]) -> None:
        """Push ball 0 in `direction`, and move on by one frame."""
        self.pushed(direction)
        left = 1.0
        while True:
            after, impact = self.next_impact()
            if after >= left:
                self.move(left)
                return
            self.move(after)
            left -= after
            self.bounce(*impact)

    def pushed(self, direction: tuple[int, int]) -> None:
        before = math.hypot(self.vx[0], self.vy[0])
        vx, vy = self.vx[0] + self.push * direction[0], self.vy[0] + self.push * direction[1]
        # A push does not make the ball faster than the limit. A ball that an impact made faster keeps its speed.
        most, now = max(self.limit, before), math.hypot(vx, vy)
        scale = most / now if now > most else 1.0
        self.vx[0], self.vy[0] = vx * scale, vy * scale

    def move(self, time: float) -> None:
        for i in range(len(self.x)):
            self.x[i] += self.vx[i] * time
            self.y[i] += self.vy[i] * time

    def next_impact(self) -> tuple[float, tuple[int, int]]:
        """The time until the next impact, and its balls; the second is -1 for a vertical wall, -2 for a horizontal."""
        x, y, vx, vy = self.x, self.y, self.vx, self.vy
        soonest, impact = math.inf, (0, 0)
        for wall, at, v in ((-1, x, vx), (-2, y, vy)):
            for i, speed in enumerate(v):
                if speed:
                    time = ((1 - RADIUS if speed > 0 else RADIUS) - at[i]) / speed
                    if time < soonest:
                        soonest, impact = time, (i, wall)
        for i, j in self.pairs:
            dx, dy, dvx, dvy = x[j] - x[i], y[j] - y[i], vx[j] - vx[i], vy[j] - vy[i]
            closing = dx * dvx + dy * dvy
            if closing < 0:
                square = dvx * dvx + dvy * dvy
                root = closing * closing - square * (dx * dx + dy * dy - 4 * RADIUS * RADIUS)
                if root > 0:
                    time = (-closing - math.sqrt(root)) / square
                    if time < soonest:
                        soonest, impact = time, (i, j)
        # Rounding may put an impact a little into the past.
        return max(soonest, 0.0), impact

    def bounce(self, i: int, j: int) -> None:
        x, y, vx, vy = self.x, self.y, self.vx, self.vy
        if j < 0:
            at, v = (x, vx) if j == -1 else (y, vy)
            at[i] = 1 - RADIUS if v[i] > 0 else RADIUS
            v[i] = -v[i]
            return
        # Equal masses exchange their velocities along the line through both centers.
        dx, dy = x[j] - x[i], y[j] - y[i]
        along = ((vx[j] - vx[i]) * dx + (vy[j] - vy[i]) * dy) / (dx * dx + dy * dy)
        vx[i] += along * dx
        vy[i] += along * dy
        vx[j] -= along * dx
        vy[j] -= along * dy


def draw(center_TN2: np.ndarray, size: int, options: Balls, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T, size, size, 3]: balls at these centers, in pixels. A pixel at an edge is covered in part, so that
    motion by less than a pixel is visible."""
    frames = len(center_TN2)
    background = rng.uniform(0, 160, (size, size, 3)) if options.texture else np.full((size, size, 3), BACKGROUND)
    radius = RADIUS * size
    # Draw in a window around each center, with a margin so that windows need not be cut off at the edges.
    margin = math.ceil(radius) + 1
    offset = np.arange(-margin, margin + 1)
    img = np.zeros((frames, size + 2 * margin, size + 2 * margin, 3), np.float32)
    img[:, margin:-margin, margin:-margin] = background
    number = np.arange(frames)[:, None, None]
    for center_T2, color in zip(center_TN2.swapaxes(0, 1), COLORS, strict=False):
        middle_T2 = np.floor(center_T2).astype(np.int64)
        # The center of pixel c is at c + 0.5.
        squares = (offset + 0.5 - (center_T2 - middle_T2)[:, :, None]).astype(np.float32) ** 2
        distance = np.sqrt(squares[:, 1, :, None] + squares[:, 0, None, :])
        covered = np.clip(np.float32(radius + 0.5) - distance, 0, 1)[..., None]
        rows = (middle_T2[:, 1, None] + margin + offset)[:, :, None]
        columns = (middle_T2[:, 0, None] + margin + offset)[:, None, :]
        window = img[number, rows, columns]
        window += covered * (color - window)
        img[number, rows, columns] = window
    img = img[:, margin:-margin, margin:-margin]
    if options.noise:
        img = img + rng.standard_normal(img.shape, np.float32) * np.float32(255 * options.noise)
    return np.clip(img + np.float32(0.5), 0, 255).astype(np.uint8)


def balls_episodes(env: str, recording: Recording) -> Iterator[Any]:
    options, size, skip = recording.balls, recording.size, recording.frame_skip
    yield {
        "action_names": list(ACTIONS), "noop": 0, "ticks_per_frame": skip,
        "state_names": [f"ball{i}_{what}" for i in range(options.count) for what in ("x", "y", "vx", "vy")],
        "state_units": ["pixels", "pixels", "pixels/frame", "pixels/frame"] * options.count,
        "balls": {"speed": options.speed, "noise": options.noise, "texture": options.texture, "radius": RADIUS * size},
    }  # fmt: skip
    directions = list(ACTIONS.values())
    policy = HeldActions(np.ones(len(ACTIONS)), recording.action_repeat, 1, np.random.default_rng(recording.seed))
    left, level = recording.frames, 0
    while left > 0:
        rng = np.random.default_rng((recording.seed, level))
        box = Box(options, rng)
        states, action = [], []
        for _ in range(min(EPISODE_FRAMES, left)):
            taken = int(policy.next()[0])
            states.append(box.state())
            action.append(taken)
            for _ in range(skip):
                box.step(directions[taken])
        state = np.array(states) * np.tile([size, size, size * skip, size * skip], options.count)
        center_TN2 = state.reshape(len(state), options.count, 4)[..., :2]
        yield Episode(draw(center_TN2, size, options, rng), np.array(action), level, state.astype(np.float32))
        left -= len(action)
        level += 1
