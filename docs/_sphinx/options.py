"""The directive `options`: a table of a config dataclass, from its fields, their defaults and its docstring.

    ```{options} mfwm.training.TrainingConfig --model.heads.
    ```

The second argument stands before the names of the options on the command line.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def described(config: type[Any]) -> dict[str, str]:
    """By name, what the Args of the docstrings of a dataclass and its bases say."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        names: list[str] = []
        section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("Args:\n")[2]
        indented = itertools.takewhile(lambda line: line.startswith("    "), section.splitlines())
        for line in textwrap.dedent("\n".join(indented)).splitlines():
            if entry := ENTRY.match(line):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            else:
                for name in names:
                    found[name] += " " + line.strip()
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a field, or MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def rows(config: type[Any], prefix: str, values: Any = None) -> list[tuple[str, str, str]]:
    """Name, default and description of each field, and of the fields of a field that is a dataclass.

    The configs of the model and of the heads have tables of their own. values: an instance with the defaults, where
    they are not those of the class.
    """
    texts = described(config)
    missing = [field.name for field in dataclasses.fields(config) if field.name not in texts]
    if missing:
        raise ValueError(f"the docstring of {config.__name__} must describe {', '.join(missing)}")
    found = []
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name.replace('_', '-')}"
        value = default_of(field) if values is None else getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            if field.name not in ("model", "heads"):
                found.append((name, "", texts[field.name]))
                found += rows(type(value), f"{name}.", value)
            continue
        shown = "required" if value is dataclasses.MISSING else f"`{value!r}`".replace("'", '"')
        found.append((name, shown, texts[field.name]))
    return found


class Options(SphinxDirective):
    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        config = getattr(importlib.import_module(module), name)
        lines = ["| option | default | what |", "| --- | --- | --- |"]
        for option, value, text in rows(config, self.arguments[1]):
            cells = (f"`{option}`", value, text)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        node = nodes.container(classes=["options"])
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, node)
        return [node]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
