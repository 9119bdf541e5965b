"""Docstrings, which are written for the terminal, as reStructuredText for autodoc.

`code` becomes a literal, an indented block after a line that ends with a colon becomes a block of code, and characters
that only reStructuredText knows are escaped. Napoleon reads the sections (Args, Returns, Raises) afterwards.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Fields|Returns|Raises):$")


def as_restructured_text(lines: list[str]) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    found: list[str] = []
    code_after: int | None = None
    for paragraph in paragraphs:
        indent = len(paragraph) - len(paragraph.lstrip(" "))
        if (code_after is not None and indent > code_after) or paragraph.lstrip().startswith(">>>"):
            found.append(paragraph)
            continue
        code_after = None
        text = escaped(paragraph)
        last = paragraph.splitlines()[-1] if paragraph.strip() else ""
        if last.endswith(":") and not SECTION.match(last.strip()):
            code_after = len(last) - len(last.lstrip(" "))
            text = text[:-1] + "::"
        found.append(text)
    return "\n\n".join(found).split("\n")


def escaped(paragraph: str) -> str:
    parts = re.split(r"(`[^`]+`)", paragraph)
    return "".join(f"`{part}`" if i % 2 else re.sub(r"[*|]", r"\\\g<0>", part) for i, part in enumerate(parts))


def convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    # Before Napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", convert, priority=400)
    return {"parallel_read_safe": True}
