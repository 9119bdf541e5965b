"""The site builds without a warning, its links lead somewhere, and a link that does not is found."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.commands import command_of
from mfwm.training import TrainingConfig

ROOT = Path(__file__).parent.parent
SPHINX = ROOT / "docs" / "_sphinx"
absent = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}: pip install '.[docs]'")


def broken(site: Path) -> list[str]:
    return runpy.run_path(str(SPHINX / "check_links.py"))["broken"](site)[0]


@needs_sphinx
def test_site_builds_and_has_no_broken_link(tmp_path: Path) -> None:
    """Without the compiled module, as `make docs` builds it."""
    site = tmp_path / "site"
    code = "import sys; sys.modules['mfwm_kernels._native'] = None; from sphinx.cmd.build import main; sys.exit(main())"
    arguments = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "doctrees"), "docs", str(site)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    built = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert broken(site) == []
    ops = (site / "reference" / "ops.html").read_text()
    assert all(f'id="mfwm_kernels.{name}"' in ops for name in ("fan_out", "multi_horizon_loss", "mtp_combine"))
    # A drawing is part of its page.
    assert '<svg class="mfwm-drawing"' in (site / "concepts.html").read_text()


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1><a href="#top">ok</a><a href="b.html#there">ok</a><a href="https://example.org/x">out</a>'
        '<a href="b.html#gone">no id</a><img src="gone.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    assert broken(tmp_path) == ["index.html: b.html#gone: no such id", "index.html: gone.png: no such file"]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SPHINX))
    return pytest.importorskip("pages", reason="needs sphinx")


@needs_sphinx
def test_links_of_included_files_are_rewritten_for_their_page(pages: Any, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    text = "[a](docs/gpu.md#on) [b](CHANGELOG.md) [c](https://x.org) ![d](docs/p.svg)\n```sh\n[e](docs/gpu.md)\n```\n"
    found = pages.relinked(text, tmp_path, docs / "guides" / "page.md", docs)
    assert found == (
        "[a](../gpu.md#on) [b](../changelog.md) [c](https://x.org) ![d](../p.svg)\n```sh\n[e](docs/gpu.md)\n```\n"
    )


@needs_sphinx
def test_docstrings_become_restructured_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SPHINX))
    from docstrings import as_restructured_text  # type: ignore[import-not-found]

    lines = ["Of `a * b` and |d|:", "", "    a * `b`", "", "Args:", "    x: |x| * 2"]
    expected = ["Of ``a * b`` and \\|d\\|::", "", "    a * `b`", "", "Args:", "    x: \\|x\\| \\* 2"]
    assert as_restructured_text(lines) == expected


@needs_sphinx
def test_every_option_of_the_tables_is_one_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SPHINX))
    from options import rows  # type: ignore[import-not-found]

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command_of("plain", ["train", "--help"], None)
    usage = capsys.readouterr().out
    tables = ((TrainingConfig, "--"), (WorldModelConfig, "--model."), (HeadsConfig, "--model.heads."))
    names = {name: default for config, prefix in tables for name, default, _ in rows(config, prefix)}
    assert names["--model.heads.horizons.offsets"] == "`(1, 2, 4, 8)`" and names["--data"] == "required"
    # A dataclass has no option of its own, and no default.
    missing = [name for name, default in names.items() if default and f"{name} " not in f"{usage} ".replace(",", " ")]
    assert not missing and len(names) > 70
