"""python docs/_sphinx/check_links.py DIR: every link of a built site to itself leads to a file, and to an id in it.

Links to other sites are counted and not fetched.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The ids of a page and the targets of its links and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


def broken(site: Path) -> tuple[list[str], int, int]:
    """The broken links, the number of links within the site, and of those to others."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found, inside, outside = [], 0, 0
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                outside += parts.scheme != "data"
                continue
            inside += 1
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not file.is_file():
                found.append(f"{path.relative_to(site.resolve())}: {target}: no such file")
            elif fragment and file in pages and fragment not in pages[file].ids:
                found.append(f"{path.relative_to(site.resolve())}: {target}: no such id")
    return found, inside, outside


def main() -> None:
    (directory,) = sys.argv[1:]
    problems, inside, outside = broken(Path(directory))
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{directory}: {inside} links within the site, {len(problems)} broken; {outside} to other sites, not fetched")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
