"""The config of a run, one tree of dataclasses, as config.json: written once, compared and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from .checkpoints import write_atomically

# How a run is run, not what it computes beyond rounding: these may change when it goes on.
MAY_CHANGE = {
    "accumulate",
    "compile",
    "checkpoint_every",
    "keep",
    "look_every",
    "parallel",
    "tensorboard",
    "wandb",
    "workers",
}

Config = TypeVar("Config")


def settle(config: Any, path: Path) -> None:
    """Write the run's config, or make sure that it is the one already there, in all that its result depends on."""
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        old, new = dict(flattened(json.loads(path.read_text()))), dict(flattened(wanted))
        for name in {**old, **new}:
            if name not in MAY_CHANGE and old.get(name) != new.get(name):
                raise ValueError(
                    f"{name} is {new.get(name)!r}, but the run in {path.parent} was begun with {old.get(name)!r}; "
                    "choose another --out"
                )
    write_atomically(path, json.dumps(wanted, indent=2).encode())


def described(config: Any) -> str:
    """A line for each value: its dotted name, and what it is."""
    return "\n".join(f"{name} = {value!r}" for name, value in flattened(dataclasses.asdict(config)))


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a tree."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read(kind: type[Config], path: Path) -> Config:
    """The config, of class `kind`, that a run was begun with."""
    return from_tree(kind, json.loads(path.read_text()))


def from_tree(kind: type[Config], tree: dict[str, Any]) -> Config:
    """A dataclass from the dicts and lists that JSON makes of it."""
    hints = get_type_hints(kind)
    if strange := [name for name in tree if name not in hints]:
        raise ValueError(f"{kind.__name__} has no {', '.join(strange)}: the run is of another kind")
    return kind(**{name: _value(hints[name], value) for name, value in tree.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        inner: Any
        (inner,) = (option for option in (hint, *get_args(hint)) if dataclasses.is_dataclass(option))
        return from_tree(inner, value)
    # JSON has lists where the configs have tuples.
    return tuple(_value(None, entry) for entry in value) if isinstance(value, list) else value
