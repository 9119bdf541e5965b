"""The config of a run, one tree of dataclasses, as config.json: written once, compared and read back.

Beside the config it holds `data_digest`, by which the run knows its data set wherever that is moved to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .checkpoints import Checkpoints, write_atomically

NAME = "config.json"
DIGEST = "data_digest"
# How a run is run, not what it computes beyond rounding: these may change when it is resumed.
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


def check_place(config: Any, run: Path) -> None:
    """ValueError where `run` holds files with the names of a run's that are not a run's. Nothing is written.

    A directory that a first start left before it wrote its config holds none of them.
    """
    path, log = run / NAME, run / "log.jsonl"
    if os.path.lexists(path):
        try:
            tree = parsed(path.read_bytes(), str(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"out holds {NAME}, which is no run's ({error}); choose another out than {run}") from error
        names = {field.name for field in dataclasses.fields(config)}
        if DIGEST not in tree and not names - MAY_CHANGE <= set(tree):
            raise ValueError(f"out holds {NAME}, which is no run's: choose another out than {run}")
        return
    if Checkpoints(run / "checkpoints").latest() is not None:
        raise ValueError(
            f"out holds checkpoints and no {NAME}, which says what they are of: put it back into {run}, "
            "or choose another out"
        )
    if os.path.lexists(log) and (not log.is_file() or log.stat().st_size > 0):
        raise ValueError(
            f"out holds {log.name}, which is no run's, for there is no {NAME}: choose another out than {run}"
        )


def settle(config: Any, run: Path, digest: str | None, *, begun: bool) -> None:
    """Write the run's config, or make sure that it is the one already there, in all that its result depends on.

    digest: of the data set; where either side has none, its path must be the same.
    begun: whether the run has anything to show; one that has not may begin with another config.
    """
    path = run / NAME
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if begun and path.exists():
        tree, known = read_tree(path)
        old, new = dict(flattened(tree)), dict(flattened(wanted))
        for name in {**old, **new}:
            if name == "data" and known is not None and digest is not None:
                if known != digest:
                    raise ValueError(
                        f"data is {new[name]}, but the run in {run} was begun with another data set, then in "
                        f"{old.get(name)}; choose another --out"
                    )
            elif name not in MAY_CHANGE and old.get(name) != new.get(name):
                raise ValueError(
                    f"{name} is {new.get(name)!r}, but the run in {run} was begun with {old.get(name)!r}; "
                    "choose another --out"
                )
    write_atomically(path, json.dumps({**wanted, DIGEST: digest}, indent=2).encode())


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


def read(kind: type[Config], run: Path) -> tuple[Config, str | None]:
    """The config, of class `kind`, that a run was begun with, and the digest of its data set where there is one.

    ValueError names the file, the rule and the value where the config is not such.
    """
    path = Path(run) / NAME
    tree, digest = read_tree(path)
    return from_tree(kind, tree, str(path)), digest


def read_tree(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a config.json holds, before it is checked, and the digest."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} is no run directory: there is no {path.name} in it") from None
    tree = parsed(content, str(path))
    digest = tree.pop(DIGEST, None)
    if digest is not None and not isinstance(digest, str):
        raise ValueError(f"{path}: {DIGEST} must be text, got {digest!r}")
    return tree, digest


def parsed(content: bytes | str, place: str) -> dict[str, Any]:
    """A JSON object; ValueError names `place` where it is none."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must hold JSON: {error or type(error).__name__}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{place} must hold a JSON object, got {type(tree).__name__}")
    return tree


def from_tree(kind: type[Config], tree: dict[str, Any], place: str) -> Config:
    """A dataclass from the dicts and lists that JSON makes of it; ValueError names `place`, field, rule and value."""
    hints = get_type_hints(kind)
    if strange := [name for name in tree if name not in hints]:
        raise ValueError(f"{place}: {kind.__name__} has no {', '.join(strange)}: the run is of another kind")
    needed = (dataclasses.MISSING, dataclasses.MISSING)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in tree and (field.default, field.default_factory) == needed:
            raise ValueError(f"{place}: {kind.__name__} needs {field.name}, which is missing")
    values = {name: value_of(hints[name], value, place, name) for name, value in tree.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def value_of(hint: Any, value: Any, place: str, name: str) -> Any:
    """`value` as the type that a field declares; JSON has lists where the configs have tuples."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return from_tree(option, value, place)  # type: ignore[arg-type]
        if option is float and type(value) is int:
            return float(value) if hint is float else value
        if get_origin(option) is tuple and isinstance(value, list):
            inner = get_args(option)
            every = inner[:1] * len(value) if inner[1:] == (...,) else inner
            if len(every) == len(value):
                try:
                    return tuple(value_of(h, v, place, name) for h, v in zip(every, value, strict=True))
                except ValueError:
                    continue
        origin = get_origin(option) or option
        if origin is Any or type(value) is origin or (origin is Literal and value in get_args(option)):
            return value
    wanted = " or ".join(getattr(o, "__name__", str(o)) if get_origin(o) is None else str(o) for o in options)
    raise ValueError(f"{place}: {name} must be {wanted.replace('typing.', '')}, got {value!r}")
