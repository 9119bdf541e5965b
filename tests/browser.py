"""A page of mfwm play in Chromium, driven by Playwright; tests skip by name where either is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@contextmanager
def served(run: Path, *options: object) -> Iterator[str]:
    """The URL at which `mfwm play` serves a run, as a process of its own."""
    command = [sys.executable, "-m", "mfwm.cli", "play", str(run), "--no-browser", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    return
            raise AssertionError("mfwm play printed no URL")
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    # Chromium refuses to sandbox itself for root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition. Playwright's own wait evaluates text in the page, which its policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 15 s: {condition}")
