"""What passes over the WebSocket: moments in binary to the page, small JSON messages from it.

A moment, little-endian: HEADER, then for each panel a float32 error (NaN: none), then the pictures as RGB bytes: the
frame; of each panel what it expects, and, if its bit is set in `have`, what it had expected of this frame; and with
GAME in `flags` the real game's frame. With GAME, a float32 follows the panels' errors: that between both frames.
With SHOWN, what was expected of this frame is left out, because the page has shown it.

Thumbnails: STARTS with their number, height and width, then their RGB bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .session import Moment

# kind, flags, panels, have (a bit for each panel with a past picture), height, width, step, input, milliseconds
HEADER = struct.Struct("<BBBBHHIIf")
# kind, 3 bytes of padding, number, height, width
STARTS = struct.Struct("<B3xIHH")
MOMENT_KIND, STARTS_KIND = 1, 2
# flags: the frame is a real one; the real game's frame follows; what was expected is left out.
REAL, GAME, SHOWN = 1, 2, 4

MESSAGE_LIMIT = 4096  # bytes of a message from the page
MOST_INPUT = 2**32


@dataclass
class GameFrame:
    """The real game's frame beside the model's, and the mean squared difference of both, in -1..1."""

    frame: np.ndarray
    error: float


def pack(
    moment: Moment, *, number: int, milliseconds: float, game: GameFrame | None = None, past: bool = True
) -> bytes:
    """number: of the newest input that the moment depends on. past: False for a page that gets every moment."""
    height, width = moment.frame.shape[:2]
    flags = (REAL if moment.step == 0 else 0) | (GAME if game is not None else 0) | (0 if past else SHOWN)
    have = sum(1 << i for i, picture in enumerate(moment.past) if picture is not None)
    header = HEADER.pack(
        MOMENT_KIND, flags, len(moment.expected), have, height, width, moment.step % MOST_INPUT, number, milliseconds
    )
    errors = np.array([*moment.errors, *([] if game is None else [game.error])], "<f4")
    parts = [header, errors.tobytes(), moment.frame.tobytes()]
    for expected, expected_before in zip(moment.expected, moment.past, strict=True):
        parts.append(expected.tobytes())
        if past and expected_before is not None:
            parts.append(expected_before.tobytes())
    if game is not None:
        parts.append(game.frame.tobytes())
    return b"".join(parts)


def pack_starts(pictures: list[np.ndarray]) -> bytes:
    height, width = pictures[0].shape[:2]
    header = STARTS.pack(STARTS_KIND, len(pictures), height, width)
    return header + b"".join(picture.tobytes() for picture in pictures)


# By kind of message: its fields and their types.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "act": {"number": (int,), "action": (int, list, type(None))},
    "pause": {"on": (bool,)},
    "step": {},
    "reset": {"start": (int, type(None))},
    "random": {"on": (bool,)},
    "temperature": {"value": (int, float)},
    "record": {"on": (bool,)},
    "source": {"game": (bool,)},
    "sync": {},
    "ask": {},
    "give": {},
}


def parsed(text: str) -> dict[str, Any]:
    """A message from the page. ValueError where it is not one of FIELDS, with just its fields."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a message must be JSON") from None
    kind = message.get("kind") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(f"kind must be one of {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    if message.keys() != {"kind", *fields}:
        raise ValueError(f"{kind} must have the fields {', '.join(fields) or '(none)'}")
    for name, types in fields.items():
        if type(message[name]) not in types:
            raise ValueError(f"{kind}: {name} must be {' or '.join(t.__name__ for t in types)}")
    if kind == "act" and not 0 <= message["number"] < MOST_INPUT:
        raise ValueError("act: number must be in 0..2**32 - 1")
    if kind == "temperature" and not 0 <= message["value"] <= 4:
        raise ValueError("temperature: value must be in 0..4")
    return message
