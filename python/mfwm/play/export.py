"""mfwm play RUN --export: a page of recorded walks in one file, which needs no server and no network."""

from __future__ import annotations

import base64
import html
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..training.checkpoints import write_atomically
from . import protocol
from .policy import RandomPolicy
from .session import Session
from .starts import Start, choose_starts, picture_of
from .world import World, describe

PAGE = Path(__file__).parent / "page"
WALKS = 3
STEPS = 96
FPS = 8
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def export(world: World, out: Path, *, seed: int = 0) -> None:
    """Write the page to `out`. FileExistsError if it exists."""
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists: choose another file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--export must be in a directory that exists, got {out}")
    write_atomically(out, page_of(world, seed=seed).encode())


def page_of(world: World, *, seed: int = 0, walks: int = WALKS, steps: int = STEPS) -> str:
    """The page as HTML, with walks from different starts under the random policy."""
    starts = choose_starts(world, np.random.default_rng(seed))
    starts = [starts[i] for i in np.linspace(0, len(starts) - 1, min(walks, len(starts))).astype(int)]
    recorded: dict[str, Any] = {
        "world": describe(world),
        "fps": FPS,
        "starts": encoded(protocol.pack_starts([picture_of(world.pictures, start) for start in starts])),
        "walks": [walk(world, start, seed, steps) for start in starts],
    }
    # In a script element, only "</" could end it early.
    data = json.dumps(recorded).replace("</", "<\\/")
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    for marker, part in (
        ('<link rel="stylesheet" href="play.css?token=TOKEN">', f"<style>\n{source('play.css')}</style>"),
        (
            '<script src="play.js?token=TOKEN"></script>',
            f'<script type="application/json" id="recorded">{data}</script>\n'
            f"<script>\n{source('play.js')}</script>\n<script>\n{source('recorded.js')}</script>",
        ),
        ("<title>mfwm play</title>", f"{policy_tag()}\n<title>mfwm play: {html.escape(world.run.name)}</title>"),
    ):
        assert marker in text, marker
        text = text.replace(marker, part)
    return text


def walk(world: World, start: Start, seed: int, steps: int) -> dict[str, Any]:
    """The moments of a walk, each with its length before it, compressed together; and the actions that were taken."""
    session, policy = Session(world, seed), RandomPolicy(world.actions, seed + start.last)
    moments, actions = [session.reset(start, policy.plan(session.longest))], []
    for _ in range(steps):
        actions.append(policy.next())
        moments.append(session.step(actions[-1], policy.plan(session.longest)))
    packed = [protocol.pack(moment, number=0, milliseconds=0, past=False) for moment in moments]
    stream = b"".join(len(part).to_bytes(4, "little") + part for part in packed)
    return {"moments": encoded(zlib.compress(stream, 9)), "actions": actions}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def source(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def policy_tag() -> str:
    return f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
