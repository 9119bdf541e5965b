"""What the site does to pages that are also read on GitHub: links that leave docs/, and drawings that follow the theme.

Some pages of the site include a file from outside docs/. A link to that file leads to its page, and the links in it are
rewritten for the page that includes it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

# Paths of the repository, and the pages of docs/ that show them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "performance.md",
    "examples/hosts": "guides/index.md",
}
# The target of a link or of a picture, up to its anchor.
TARGET = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
FENCE = re.compile(r"(^ *(`{3,}|:{3,}).*?^ *\2 *$)", re.DOTALL | re.MULTILINE)


def relinked(text: str, folder: Path, page: Path, docs: Path) -> str:
    """`text` of a file in `folder`, with the targets of its links as `page` needs them. Code is left alone."""

    def target(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match[1], docs.parent)
        shown = docs / PAGES[path] if path in PAGES else docs.parent / path
        return os.path.relpath(shown, page.parent)

    # FENCE has two groups, so every third part is outside of fences.
    parts = FENCE.split(text)
    return "".join(TARGET.sub(target, part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)


def relink_page(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    page = docs / f"{docname}.md"
    source[0] = relinked(source[0], page.parent, page, docs)


def relink_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    docs = Path(app.srcdir)
    file = Path(os.path.normpath(docs / path))
    if file.suffix == ".md":
        content[0] = relinked(content[0], file.parent, docs / f"{app.env.docname}.md", docs)


def inline_drawings(app: Sphinx, doctree: nodes.document) -> None:
    """A drawing of docs/pictures becomes part of the page, so that its colours follow the theme that is chosen."""
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".svg" and path.parent.name == "pictures":
            image.replace_self(nodes.raw("", f'<div class="drawing">{path.read_text()}</div>', format="html"))
            app.env.note_dependency(str(path))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", relink_page)
    app.connect("include-read", relink_included)
    app.connect("doctree-read", inline_drawings)
    return {"parallel_read_safe": True}
