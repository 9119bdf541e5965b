"""Checks of configs and ids that several modules share. Every error names the argument, the rule and the value."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from mfwm_kernels import arguments as check


def check_choices(config: Any) -> None:
    """ValueError unless each Literal field of a dataclass has one of its values, which Python does not check.

    A field that may also be a tuple of Literals has one of their values in every entry.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), (hint, *get_args(hint))
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if not choices or (value is None and type(None) in kinds):
            continue
        if isinstance(value, tuple) and any(get_origin(kind) is tuple for kind in kinds):
            for i, entry in enumerate(value):
                check.choice(f"{name}[{i}]", entry, choices)
        else:
            check.choice(name, value, choices)


def check_frame(frame: tuple[int, int, int]) -> None:
    """ValueError unless it is (channels, height, width) of pixels, or (ids per token, rows, columns)."""
    if len(check.integers("frame", frame, least=1)) != 3:
        raise ValueError(f"frame must be (channels, height, width), got {frame}")


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """ValueError unless all ids are in 0..count - 1."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise ValueError(f"{name} must be in 0..{count - 1}, got {wrong[0].item()}")


def options_repr(config: Any, *always: str) -> str:
    """A config in the style of torch.nn's extra_repr: the fields named, and others that are not at their default."""
    shown = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in always or (field.default is not dataclasses.MISSING and value != field.default):
            shown.append(f"{field.name}={value!r}")
    return ", ".join(shown)
