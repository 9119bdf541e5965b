"""Kills `collect`, `import-videos` and `encode` with `overwrite` at random moments.

Each time, the old set or the new one must be there whole.

    python tests/killed_writer.py DIR --kills 50

Every command is a fork of this process, which has imported all that it needs and computed nothing, and is killed within
the time that it takes when nobody kills it. Two versions of every set take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from mfwm.data import Replay, collect
from mfwm.data.check import check
from mfwm.data.import_videos import import_videos
from mfwm.data.recording import Recording
from mfwm.encode import encode
from mfwm.models.tokenizer import TokenizerConfig
from mfwm.training.tokenizer import TokenizerTraining, train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from killed_run import forked, must, result

EPISODES, FRAMES, SIDE = 6, 40, 32


def noise(version: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(version)
    for _ in range(EPISODES):
        yield rng.integers(256, size=(FRAMES, SIDE, SIDE, 3)).astype(np.uint8), rng.integers(4, size=FRAMES)


def stub(env: str, recording: Recording) -> Iterator[Any]:
    """A source of `collect`, in place of a game."""
    yield {"action_names": list("nesw"), "noop": 0}
    for level, (img, action) in enumerate(noise(recording.seed)):
        yield collect.Episode(img, action, level)


def run_collect(version: int, place: Path, out: Path) -> None:
    collect.source_of = lambda env: stub
    collect.collect("stub", EPISODES * FRAMES, out, seed=version, size=SIDE, overwrite=True, progress=False)


def run_import(version: int, place: Path, out: Path) -> None:
    import_videos(place / f"videos{version}", out, overwrite=True, progress=False)


def run_encode(version: int, place: Path, out: Path) -> None:
    encode(place / f"pixels{version}", out, tokenizer=place / "tok", overwrite=True, progress=False)


COMMANDS = {"collect": run_collect, "import-videos": run_import, "encode": run_encode}


def prepare(place: Path) -> None:
    """What the commands read, and what they write when nobody kills them."""
    for version in (0, 1):
        run_collect(version, place, place / f"pixels{version}")
        videos = place / f"videos{version}"
        videos.mkdir()
        rows = []
        for number, (frames, action) in enumerate(noise(version)):
            name = f"{number}.mp4"
            with av.open(str(videos / name), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
                for img in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(img, format="rgb24")))
                container.mux(stream.encode())
            rows += [f"{name},{t},{value}" for t, value in enumerate(action)]
        (videos / "actions.csv").write_text("video,frame,action\n" + "\n".join(rows))
    model = TokenizerConfig(frame=(3, SIDE, SIDE), patch=4, width=32, layers=1, head_width=16)
    tokenizer = TokenizerTraining(
        str(place / "pixels0"), steps=1, clip=4, warmup=1, dtype="float32", held_out=0.25, look_every=0,
        tensorboard=False, model=model,
    )  # fmt: skip
    train_tokenizer(tokenizer, place / "tok", progress=False)
    for name, run in COMMANDS.items():
        for version in (0, 1):
            run(version, place, place / f"{name}{version}")


def version_of(place: Path, name: str) -> int:
    """Which of the two versions is in the place of a command's set, whole; raises where neither is."""
    out = place / name
    assert not [problem for problem in check(out, 1) if problem.invalid], check(out, 1)
    found = Replay(out)
    for version in (0, 1):
        right = Replay(place / f"{name}{version}")
        if found.frames == right.frames and np.array_equal(found.video, right.video):
            assert np.array_equal(found.action, right.action)
            assert np.array_equal(found.episode_ends, right.episode_ends)
            return version
    raise AssertionError(f"{out} is neither the old set nor the new one")


def left(place: Path, name: str) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith(f".{name}."))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    place, rng = arguments.place, random.Random(arguments.seed)
    place.mkdir(parents=True, exist_ok=True)
    must(partial(prepare, place))

    takes = {}
    for name, run in COMMANDS.items():
        began = time.perf_counter()
        must(partial(run, 0, place, place / name))
        takes[name] = time.perf_counter() - began

    def leave_version(name: str) -> Callable[[], None]:
        def work() -> None:
            raise SystemExit(10 + version_of(place, name))

        return work

    counts = dict.fromkeys(("killed", "old", "new", "with leftovers"), 0)
    stands = dict.fromkeys(COMMANDS, 0)
    while counts["killed"] < arguments.kills:
        name = list(COMMANDS)[counts["killed"] % len(COMMANDS)]
        child = forked(partial(COMMANDS[name], 1 - stands[name], place, place / name))
        time.sleep(rng.uniform(0, 1.2 * takes[name]))
        os.kill(child, signal.SIGKILL)
        if (status := result(child)) not in (0, -signal.SIGKILL):
            raise SystemExit(f"{name} left with {status}")
        found = result(forked(leave_version(name))) - 10
        if found not in (0, 1):
            raise SystemExit(f"{name}: neither set is whole after kill {counts['killed']}")
        if status:
            counts["killed"] += 1
            counts["old" if found == stands[name] else "new"] += 1
            counts["with leftovers"] += bool(left(place, name))
        stands[name] = found
    for name, run in COMMANDS.items():
        must(partial(run, 1 - stands[name], place, place / name))
        if left(place, name):
            raise SystemExit(f"{name} left {left(place, name)}")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
