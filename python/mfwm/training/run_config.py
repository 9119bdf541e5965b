"""The config of a run, a tree of dataclasses, in config.json: written at the start, compared when a run is resumed.

It also holds `data_digest`, by which the run recognises its data set wherever that is moved.
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
# These may change when a run is resumed: they do not change what it computes, beyond rounding.
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


def check_out(config: Any, run: Path) -> None:
    """ValueError where `run` holds files with the names of a run's files that no run wrote. Nothing is written.

    A run that stopped before it wrote its config has left none of them.
    """
    path, log = run / NAME, run / "log.jsonl"
    if os.path.lexists(path):
        try:
            tree = parsed(path.read_bytes(), str(path))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"out holds {NAME}, which no run wrote ({error}); choose another out than {run}"
            ) from error
        names = {field.name for field in dataclasses.fields(config)}
        if DIGEST not in tree and not names - MAY_CHANGE <= set(tree):
            raise ValueError(f"out holds {NAME}, which no run wrote: choose another out than {run}")
        return
    if Checkpoints(run / "checkpoints").latest() is not None:
        raise ValueError(
            f"out holds checkpoints but no {NAME}, which says what model they are of: put it back into {run}, "
            "or choose another out"
        )
    if os.path.lexists(log) and (not log.is_file() or log.stat().st_size > 0):
        raise ValueError(f"out holds {log.name} but no {NAME}, so no run wrote it: choose another out than {run}")


def write_or_compare(config: Any, run: Path, digest: str | None, *, begun: bool) -> None:
    """Write the run's config. ValueError where the one already there differs in an option that the result depends on.

    digest: of the data set. If either config has none, the paths of the data must be equal.
    begun: whether the run has a log or checkpoints; one that has neither may start again with another config.
    """
    path = run / NAME
    if begun and path.exists():
        compare(config, run, digest)
    given = {**dataclasses.asdict(config), DIGEST: digest}
    write_atomically(path, json.dumps(given, indent=2).encode())


def compare(config: Any, run: Path, digest: str | None) -> None:
    """ValueError where the run's config differs from `config` in an option that the result depends on.

    An option that the run's config lacks, because it was added later, had its default. digest as in write_or_compare.
    """
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    tree, old_digest = read_tree(run / NAME)
    old, new = dict(flattened(completed(type(config), tree))), dict(flattened(given))
    for name in {**old, **new}:
        if name == "data" and old_digest is not None and digest is not None:
            if old_digest != digest:
                raise ValueError(
                    f"data is {new[name]}, but the run in {run} was started with another data set, which was in "
                    f"{old.get(name)}; choose another --out"
                )
        elif name not in MAY_CHANGE and old.get(name) != new.get(name):
            if name not in old or name not in new:
                raise ValueError(
                    f"only {'this config' if name in new else f'the run in {run}'} has the option {name}: the run "
                    f"in {run} is of another kind or of another version; choose another --out"
                )
            raise ValueError(
                f"{name} is {new.get(name)!r}, but the run in {run} was started with {old.get(name)!r}; "
                "choose another --out"
            )


def completed(kind: type[Any], tree: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a config with the defaults of the options that it lacks."""
    found, hints = dict(tree), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if field.name not in found:
            if field.default is not dataclasses.MISSING:
                found[field.name] = json.loads(json.dumps(field.default))
        elif dataclasses.is_dataclass(hint) and isinstance(found[field.name], dict):
            found[field.name] = completed(hint, found[field.name])  # type: ignore[arg-type]
    return found


def as_lines(config: Any) -> str:
    """A line for each value: its dotted name and the value."""
    return "\n".join(f"{name} = {value!r}" for name, value in flattened(dataclasses.asdict(config)))


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a tree of dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read(kind: type[Config], run: Path) -> tuple[Config, str | None]:
    """The config, of class `kind`, that a run was started with, and the digest of its data set if it has one.

    ValueError names file, rule and value where the config is not a valid one of this class.
    """
    path = Path(run) / NAME
    tree, digest = read_tree(path)
    return from_tree(kind, tree, str(path)), digest


def read_tree(path: Path) -> tuple[dict[str, Any], str | None]:
    """The contents of a config.json before they are checked, and the digest."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    tree = parsed(content, str(path))
    digest = tree.pop(DIGEST, None)
    if digest is not None and not isinstance(digest, str):
        raise ValueError(f"{path}: {DIGEST} must be text, got {digest!r}")
    return with_equal_weights(tree), digest


def with_equal_weights(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with weights of 1 in place of None, if it was written when that was their default.

    Options that came with the decaying weights tell: such a tree lacks weight_schedule.
    """
    model = tree.get("model")
    heads = model.get("heads") if isinstance(model, dict) and "weight_schedule" not in tree else None
    horizons = heads.get("horizons") if isinstance(heads, dict) and heads.get("weights") is None else None
    if not isinstance(horizons, dict) or not isinstance(horizons.get("offsets"), list):
        return tree
    heads = {**heads, "weights": [1.0] * len(horizons["offsets"])}  # type: ignore[dict-item]
    return {**tree, "model": {**model, "heads": heads}}  # type: ignore[dict-item]


def parsed(content: bytes | str, place: str) -> dict[str, Any]:
    """A JSON object. ValueError names `place` if it is not one."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must hold JSON: {error or type(error).__name__}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{place} must hold a JSON object, got {type(tree).__name__}")
    return tree


def from_tree(kind: type[Config], tree: dict[str, Any], place: str) -> Config:
    """A dataclass from the dicts and lists of its JSON. ValueError names `place`, field, rule and value."""
    hints = get_type_hints(kind)
    if unknown := [name for name in tree if name not in hints]:
        raise ValueError(
            f"{place}: {kind.__name__} has no {', '.join(unknown)}: this is another kind of run, or another version's"
        )
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in tree and (field.default, field.default_factory) == required:
            raise ValueError(f"{place}: {kind.__name__} needs {field.name}, which is missing")
    values = {name: value_of(hints[name], value, place, name) for name, value in tree.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def value_of(hint: Any, value: Any, place: str, name: str) -> Any:
    """`value` as the type that a field declares: JSON has lists where the configs have tuples."""
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
    rule = " or ".join(getattr(o, "__name__", str(o)) if get_origin(o) is None else str(o) for o in options)
    raise ValueError(f"{place}: {name} must be {rule.replace('typing.', '')}, got {value!r}")
