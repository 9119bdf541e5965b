"""The documentation does what it says: its Python runs, its commands are commands, its links lead somewhere."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mfwm.cli import __doc__ as description
from mfwm.commands import command_of
from mfwm.presets import PRESETS
from small_run import moving_squares

ROOT = Path(__file__).parent.parent
ROOT_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# Programs of other packages, whose options are not checked.
FOREIGN = {"auditwheel", "build", "jupyter", "tensorboard"}


def blocks(page: Path, language: str) -> list[str]:
    found = [match for match in BLOCK.finditer(page.read_text()) if match[2] == language]
    return [re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE) for match in found]


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in one namespace, in a folder where data/coinrun is a small data set."""
    monkeypatch.chdir(tmp_path)
    if "data/coinrun" in "".join(blocks(page, "python")):
        moving_squares(tmp_path / "data" / "coinrun")
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)


class Parsed(Exception):
    """Raised where a program has parsed its arguments, and would begin."""


def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def check_mfwm(arguments: list[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="plain")
    chosen, rest = first.parse_known_args(arguments)
    try:
        command_of(chosen.preset, rest, description)
    except SystemExit as end:
        assert end.code in (0, None), arguments


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-m" and arguments[1] == "pytest":
        files = [word for word in arguments[2:] if word.startswith("tests/")]
        assert files and all(list(ROOT.glob(file)) for file in files), arguments
        return
    module = arguments[0] == "-m"
    name, rest = (arguments[1], arguments[2:]) if module else (arguments[0], arguments[1:])
    if name == "setup.py" or (module and name in FOREIGN):
        return
    path = ROOT / (name.replace(".", "/") if module else name)
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_file(), f"{name} does not exist"
    if "ArgumentParser" not in path.read_text() and "small_trainer" not in path.read_text():
        assert not rest, f"{name} takes no arguments"
        return
    monkeypatch.setattr("sys.argv", [name, *rest])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Parsed):
        runpy.run_module(name, run_name="__main__") if module else runpy.run_path(str(path), run_name="__main__")


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, given, _ = word.partition("=")
        assert f"$({name}" in makefile if given else re.search(rf"^{name}:", makefile, re.MULTILINE), word


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|mfwm-kernels)\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(extras), word


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_of_a_page_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: options are parsed, files, targets and extras exist."""
    monkeypatch.chdir(ROOT)
    for program, *arguments in commands(page):
        if program == "torchrun":
            arguments = arguments[arguments.index("mfwm.cli") + 1 :]
            program = "mfwm"
        with monkeypatch.context() as patched:
            if program == "mfwm":
                check_mfwm(arguments)
            elif program in ("python", ".venv/bin/python"):
                parse_only(patched)
                check_python(arguments, patched)
            elif program == "make":
                check_make(arguments)
            elif program == "pip":
                check_pip(arguments)
            elif program not in FOREIGN:
                assert (ROOT / program).is_file(), f"{program} is not a command"


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^( *)```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        slugs.add(words.strip().replace(" ", "-"))
    return slugs


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)) if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_no_sum_becomes_a_list(page: Path) -> None:
    """Where "frame n + 1" is broken before its plus, Markdown begins a list."""
    assert not re.findall(r"^ *\+ .*", prose(page), re.MULTILINE)
