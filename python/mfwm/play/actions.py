"""The actions of a run, and the keys that stand for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.replay import Replay
from ..models.world_model import WorldModelConfig

# Codes of KeyboardEvent.code, by what an action's name says. The first is shown on the page.
ARROWS = {
    "RIGHT": ("ArrowRight", "KeyD"),
    "UP": ("ArrowUp", "KeyW"),
    "LEFT": ("ArrowLeft", "KeyA"),
    "DOWN": ("ArrowDown", "KeyS"),
}
WORDS = {
    **ARROWS,
    "FIRE": ("Space",),
    "ATTACK": ("Space",),
    "JUMP": ("Space",),
    "USE": ("Enter",),
    "SPEED": ("ShiftLeft", "ShiftRight"),
    "MOVE_FORWARD": ARROWS["UP"],
    "MOVE_BACKWARD": ARROWS["DOWN"],
    "TURN_LEFT": ("ArrowLeft",),
    "TURN_RIGHT": ("ArrowRight",),
    "MOVE_LEFT": ("KeyA",),
    "MOVE_RIGHT": ("KeyD",),
}
NOOPS = ("NOOP", "NONE", "NO_OP")
# Keys of the page itself: pause, next step, reset, policy, capture.
RESERVED = ("KeyP", "KeyN", "KeyR", "KeyO", "KeyC")
SPARE = (*(f"Digit{i}" for i in (*range(1, 10), 0)), *(f"Key{c}" for c in "QWERTYUIOPASDFGHJKLZXCVBNM"))
# Of the values of a continuous action in the data, those that a slider leaves out on either side.
OUTLIERS = 1.0

Keys = list[tuple[str, ...]]  # an action needs one key of each group to be held


@dataclass(frozen=True)
class Actions:
    """kind: "discrete" with a name and keys for each action, "continuous" with ranges for each number, or "none".

    noop: the discrete action when no key is held; `rest` is what stands for it in continuous actions, 0 where it is in
    the range.
    """

    kind: str
    names: list[str] = field(default_factory=list)
    keys: list[Keys] = field(default_factory=list)
    noop: int = 0
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    repeat: int = 4

    @property
    def rest(self) -> Any:
        if self.kind == "discrete":
            return self.noop
        if self.kind == "none":
            return None
        return tuple(min(max(0.0, low), high) for low, high in zip(self.low, self.high, strict=True))

    def checked(self, action: Any) -> Any:
        """The action that a message holds; ValueError if the model has no such action."""
        if self.kind == "discrete":
            if type(action) is not int or not 0 <= action < len(self.names):
                raise ValueError(f"action must be in 0..{len(self.names) - 1}")
            return action
        if self.kind == "none":
            if action is not None:
                raise ValueError("action must be null: this model has none")
            return None
        if not isinstance(action, list) or len(action) != len(self.low):
            raise ValueError(f"action must be a list of {len(self.low)} numbers")
        if not all(type(number) in (int, float) and abs(number) < 1e30 for number in action):
            raise ValueError("action must hold finite numbers")
        limits = zip(action, self.low, self.high, strict=True)
        return tuple(float(min(max(number, low), high)) for number, low, high in limits)

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": self.kind, "rest": self.rest}
        if self.kind == "discrete":
            found |= {"names": self.names, "keys": self.keys}
        elif self.kind == "continuous":
            found |= {"low": self.low, "high": self.high}
        return found


def actions_of(config: WorldModelConfig, replay: Replay) -> Actions:
    """The actions of a model, by the names that its data set gives them."""
    repeat = replay.attributes.get("action_repeat")
    repeat = repeat if type(repeat) is int and repeat >= 1 else 4
    if config.actions:
        given = replay.attributes.get("action_names")
        if not isinstance(given, list) or len(given) != config.actions:
            given = [f"action {i}" for i in range(config.actions)]
        names = [str(name) for name in given]
        noop = replay.attributes.get("noop")
        noop = noop if type(noop) is int and 0 <= noop < config.actions else no_key(names)
        return Actions("discrete", names, keys_of(names, noop), noop, repeat=repeat)
    if config.action_size:
        low, high = (np.percentile(replay.action, q, axis=0) for q in (OUTLIERS, 100 - OUTLIERS))
        # A number that never changes still gets a slider.
        high = np.where(high > low, high, low + 1)
        return Actions("continuous", low=low.tolist(), high=high.tolist(), repeat=repeat)
    return Actions("none", repeat=repeat)


def no_key(names: list[str]) -> int:
    """The action when no key is held: one that is called NOOP, else the first."""
    return next((i for i, name in enumerate(names) if name.upper() in NOOPS), 0)


def keys_of(names: list[str], noop: int) -> list[Keys]:
    """The keys of every action. Names of directions get arrows and WASD, FIRE the space bar, a letter its own key, and
    what is left the digits and letters that are free. RIGHT+UP, as procgen writes it, needs both keys, and so does
    UPRIGHTFIRE, as Atari does."""
    parts = [[] if i == noop else parts_of(name) for i, name in enumerate(names)]
    letters = {f"Key{part}" for own in parts if own for part in own if re.fullmatch("[A-Z]", part)}
    keys: list[Keys | None] = []
    for own in parts:
        groups = None if own is None else [codes_of(part, letters) for part in own]
        keys.append(None if groups is None or groups in keys or not all(groups) else groups)
    taken = {code for groups in keys for group in groups or () for code in group} | set(RESERVED)
    spare = iter(code for code in SPARE if code not in taken)
    # Once all keys are taken, an action has none, and only the page's button stands for it.
    filled = [[(next(spare, ""),)] if groups is None else groups for groups in keys]
    return [[group for group in groups if group[0]] for groups in filled]


def parts_of(name: str) -> list[str] | None:
    """The words of a name that stand for keys; None if it has others."""
    words = re.split(r"[+ ]", name.upper())
    found: list[str] = []
    for word in words:
        if word in WORDS or re.fullmatch("[A-Z]", word):
            found.append(word)
            continue
        joined = re.fullmatch(r"(UP|DOWN)?(RIGHT|LEFT)?(FIRE)?", word)
        if not word or joined is None:
            return None
        found += [part for part in joined.groups() if part]
    return found


def codes_of(part: str, letters: set[str]) -> tuple[str, ...]:
    """The keys of a word. A letter that is an action of its own, as in procgen, stands for nothing else."""
    if part not in WORDS:
        code = f"Key{part}"
        return () if code in RESERVED else (code,)
    return tuple(code for code in WORDS[part] if code not in letters)
