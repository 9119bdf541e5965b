"""The page of recorded walks: one file, which needs no server, and which the report of an evaluation links to."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, until
from mfwm import cli
from mfwm.evaluation import evaluate, write_report
from mfwm.play import protocol
from mfwm.play.export import page_of
from mfwm.play.world import World, load_world
from play_run import trained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(trained(tmp_path_factory.mktemp("play")))


def test_the_page_holds_the_walks_and_refers_to_nothing(world: World) -> None:
    page = page_of(world, walks=2, steps=10)
    assert "TOKEN" not in page and not re.findall(r"(?:src|href)=\"(?!data:)", page) and "http://" not in page
    found = re.search(r'id="recorded">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    recorded = json.loads(found[1])
    assert recorded["world"]["run"] == "run" and len(recorded["walks"]) == 2
    stream = zlib.decompress(base64.b64decode(recorded["walks"][1]["moments"]))
    count, have = 0, []
    while stream:
        length = int.from_bytes(stream[:4], "little")
        header = protocol.HEADER.unpack_from(stream[4:])
        assert header[6] == count and length == protocol.HEADER.size + 16 + 3 * (2 * 256 + 64 + 16 + 4)
        have.append(header[3])
        stream, count = stream[4 + length :], count + 1
    # The panels of offsets 1, 2, 4 and 8 have something to show from those steps on.
    assert count == 11 and have == [0, 1, 3, 3, 7, 7, 7, 7, 15, 15, 15]
    assert len(recorded["walks"][1]["actions"]) == 10


def test_the_page_plays_without_a_server(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["mfwm", "play", str(world.run), "--export", str(out)])
    cli.main()
    with pytest.raises(SystemExit):
        cli.main()
    assert out.stat().st_size > 10_000 and len(list(tmp_path.iterdir())) == 1
    with chromium() as browser:
        page = browser.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(out.as_uri())
        until(page, "Number(document.getElementById('steps').textContent) > 9")
        page.keyboard.press("KeyP")
        step = int(page.inner_text("#steps"))
        page.keyboard.press("KeyN")
        assert page.inner_text("#steps") == str(step + 1)
        errors = page.eval_on_selector_all(".panel .error", "(all) => all.map((p) => p.textContent)")
        assert all(words == "exactly this" or words.startswith("off by") for words in errors)
        page.click("#starts button[data-start='1']")
        until(page, "document.getElementById('steps').textContent === '0'")
        assert told == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_report_links_to_the_walks(world: World) -> None:
    evaluate(world.run, clips=4, steps=6, progress=False, probes=False)
    report = write_report(world.run)
    assert 'href="play.html"' in report.read_text()
    assert 'id="recorded"' in (world.run / "play.html").read_text()
    level = load_world(world.run).level
    assert level is None or np.isfinite(level)
