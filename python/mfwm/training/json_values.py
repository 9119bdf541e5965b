"""Figures as JSON, which has no NaN and no infinities."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(values: Any, *, indent: int | None = None) -> str:
    """JSON of dicts, lists and figures, with null for figures that are not finite."""
    return json.dumps(finite(values), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value, or tree of values, with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
