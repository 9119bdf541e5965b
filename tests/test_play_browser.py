"""The page of mfwm play in a real browser: keys, panels, buttons, and no error in the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, served, until
from mfwm.data.check import check
from play_run import trained

SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("play"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    with served(run, "--fps", 20) as found:
        yield found


@pytest.fixture
def page(url: str, browser: Any) -> Iterator[Any]:
    """A paused page that plays. A test fails if its console has an error or a warning."""
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(url)
    page.wait_for_selector("canvas.horizon")
    until(page, "document.getElementById('role').textContent === 'you play'")
    if page.get_attribute("#pause", "aria-pressed") == "false":
        press(page, "KeyP", "document.getElementById('pause').getAttribute('aria-pressed') === 'true'")
    yield page
    page.close()
    assert told == []


def press(page: Any, key: str, condition: str) -> None:
    page.keyboard.press(key)
    until(page, condition)


def steps(page: Any) -> int:
    return int(page.inner_text("#steps"))


def pixels(page: Any, selector: str = "#frame") -> list[int]:
    script = "(c) => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
    return page.eval_on_selector(selector, script)


def start_at(page: Any, number: int) -> list[int]:
    """Reset to a start, and return its picture."""
    page.click(f"#starts button[data-start='{number}']")
    until(page, "document.getElementById('steps').textContent === '0'")
    pressed = (
        f"document.querySelector('#starts button[data-start=\"{number}\"]').getAttribute('aria-pressed') === 'true'"
    )
    until(page, pressed)
    return pixels(page)


def step(page: Any) -> None:
    press(page, "KeyN", f"document.getElementById('steps').textContent === '{steps(page) + 1}'")


def test_a_held_key_walks_on(page: Any) -> None:
    before = start_at(page, 0)
    press(page, "KeyP", "document.getElementById('pause').getAttribute('aria-pressed') === 'false'")
    first = steps(page)
    page.keyboard.down("Digit1")
    time.sleep(2)
    page.keyboard.up("Digit1")
    assert steps(page) >= first + 10 and pixels(page) != before
    assert float(page.inner_text("#fps")) > 5 and float(page.inner_text("#latency")) > 0


def test_another_key_leads_to_another_picture(page: Any) -> None:
    def after(key: str) -> list[int]:
        start_at(page, 0)
        page.keyboard.down(key)
        for _ in range(5):
            step(page)
        page.keyboard.up(key)
        return pixels(page)

    assert after("Digit1") == after("Digit1") != after("Digit2")


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what the page shows next: it follows the keys after the server's answer."""
    end = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_panels_have_their_sizes_and_follow_the_keys(page: Any) -> None:
    start_at(page, 0)
    shown = "(all) => all.map((c) => [c.dataset.offset, c.dataset.factor, c.width, c.height].map(Number))"
    assert page.eval_on_selector_all("canvas.horizon", shown) == [
        [1, 1, SIZE, SIZE],
        [2, 2, SIZE // 2, SIZE // 2],
        [4, 4, SIZE // 4, SIZE // 4],
        [8, 8, SIZE // 8, SIZE // 8],
    ]
    # While it is paused, another key changes what is expected, and not the frame.
    frame, near = pixels(page), pixels(page, "canvas.horizon[data-offset='1']")
    page.keyboard.down("Digit2")
    eventually(lambda: pixels(page, "canvas.horizon[data-offset='1']") != near)
    page.keyboard.up("Digit2")
    eventually(lambda: pixels(page, "canvas.horizon[data-offset='1']") == near)
    assert pixels(page) == frame
    # What the nearest panel shows is what comes, and after eight steps every panel shows what it became.
    for _ in range(8):
        expected = pixels(page, "canvas.horizon[data-offset='1']")
        step(page)
        assert pixels(page) == expected
    told = page.eval_on_selector_all(".panel .error", "(all) => all.map((p) => p.textContent)")
    assert told[0] == "exactly this" and all(words.startswith("off by ") for words in told[1:]), told


def test_pause_single_step_and_reset(page: Any) -> None:
    start = start_at(page, 2)
    time.sleep(0.4)
    assert steps(page) == 0
    step(page)
    time.sleep(0.4)
    assert steps(page) == 1
    for _ in range(3):
        step(page)
    assert start_at(page, 2) == start == pixels(page, "#starts button[data-start='2'] canvas")
    assert page.inner_text("#caption") == "a real frame: the start"
    # By the keyboard alone: R, and a thumbnail that has the focus.
    step(page)
    press(page, "KeyR", "document.getElementById('steps').textContent === '0'")
    step(page)
    page.focus("#starts button[data-start='2']")
    press(page, "Enter", "document.getElementById('steps').textContent === '0'")
    assert pixels(page) == start


def test_the_random_policy_presses_keys(page: Any) -> None:
    start_at(page, 0)
    press(page, "KeyO", "document.getElementById('random').getAttribute('aria-pressed') === 'true'")
    assert "policy" in page.inner_text("#expects")
    step(page)
    # A key takes over.
    page.keyboard.down("Digit1")
    until(page, "document.getElementById('random').getAttribute('aria-pressed') === 'false'")


def test_a_recording_is_sound(page: Any, run: Path) -> None:
    start_at(page, 0)
    press(page, "KeyC", "document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    for _ in range(7):
        step(page)
    page.keyboard.press("KeyC")
    until(page, "document.getElementById('notice').textContent.includes('frames recorded')")
    path = sorted((run / "play").glob("????"))[-1]
    assert check(path, 4) == [] and str(path) in page.inner_text("#notice")


def test_nothing_moves_while_it_plays_and_it_fits_when_enlarged(page: Any) -> None:
    places = (
        "() => [...document.querySelectorAll('canvas, button, h2, dd')].map((e) => e.getBoundingClientRect())"
        ".map((r) => [r.x, r.y, r.width, r.height].join())"
    )
    start_at(page, 0)
    page.wait_for_timeout(200)
    before = page.evaluate(places)
    for _ in range(9):
        step(page)
    assert page.evaluate(places) == before
    # At 200 % a window of 1280 pixels has 640.
    page.set_viewport_size({"width": 640, "height": 450})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_viewer_asks_for_the_controls(page: Any, browser: Any) -> None:
    other = browser.new_page()
    other.goto(page.url)
    until(other, "document.getElementById('role').textContent.startsWith('you watch')")
    assert other.is_disabled("#pause")
    other.click("#controls")
    until(page, "document.getElementById('controls').textContent.includes('hand over')")
    page.click("#controls")
    until(other, "document.getElementById('role').textContent.startsWith('you play')")
    until(page, "document.getElementById('role').textContent.startsWith('you watch')")
    other.close()
    until(page, "document.getElementById('role').textContent === 'you play'")
