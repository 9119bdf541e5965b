"""The directive `options`: a table of a config dataclass, from its fields, their defaults and its docstring.

    ```{options} mfwm.training.TrainingConfig --model.heads.
    ```

The second argument, if given, stands before the names of the options on the command line.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
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
        for line in inspect.cleandoc(section).splitlines():
            if entry := ENTRY.match(line):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            elif not line.startswith(" "):
                names = []
            for name in names if line.startswith(" ") else ():
                found[name] += " " + line.strip()
    return found


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default).replace("'", '"')
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return ""


def rows(config: type[Any], prefix: str) -> list[tuple[str, str, str]]:
    """Name, default and description of each field that is a value; a field that is a config has a table of its own."""
    texts = described(config)
    missing = [field.name for field in dataclasses.fields(config) if field.name not in texts]
    if missing:
        raise ValueError(f"the docstring of {config.__name__} must describe {', '.join(missing)}")
    found = []
    for field in dataclasses.fields(config):
        if field.default_factory is not dataclasses.MISSING and field.name in ("model", "heads"):
            continue
        name = f"{prefix}{field.name.replace('_', '-')}" if prefix else field.name
        found.append((name, default(field), texts[field.name]))
    return found


class Options(SphinxDirective):
    required_arguments, optional_arguments = 1, 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        config = getattr(importlib.import_module(module), name)
        lines = ["| option | default | what |", "| --- | --- | --- |"]
        for option, value, text in rows(config, (self.arguments[1:] or [""])[0]):
            cells = (f"`{option}`", f"`{value}`" if value else "required", text)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        node = nodes.container(classes=["options"])
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, node)
        return [node]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
