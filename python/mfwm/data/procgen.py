"""CoinRun and the other procgen games for `mfwm collect`: starts the recorder in an environment of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import coinrun_recorder
from .coinrun_recorder import MESSAGE, REQUIREMENT
from .procgen_state import FRAME
from .recording import Episode, Recording

PYTHONS = ((3, 11), (3, 12))


def procgen_episodes(env: str, recording: Recording) -> Iterator[Any]:
    seed, num_levels = recording.seed, recording.num_levels
    if (seed + 1) * num_levels >= 2**31:
        raise ValueError(f"seed must be less than {2**31 // num_levels - 1} for {num_levels} levels, got {seed}")
    python = procgen_python()
    settings = {
        "frames": recording.frames, "seed": seed, "action-repeat": recording.action_repeat, "num-levels": num_levels,
        "start-level": seed * num_levels, "frame-skip": recording.frame_skip,
    }  # fmt: skip
    # -I: otherwise the recorder would import modules from its own folder, or from PYTHONPATH, first.
    command = [str(python), "-I", coinrun_recorder.__file__, env]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            if not first:
                raise EOFError
            description = json.loads(first)
            yield description
            columns = len(description.get("state_names", []))
            while (episode := receive(process.stdout, columns)) is not None:
                if episode.state is not None:
                    # All of its columns are lengths, in pixels of procgen's own frames.
                    episode.state = episode.state * np.float32(recording.size / FRAME)
                yield episode
        except EOFError:
            status = process.wait()
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"the {env} recorder stopped early (exit status {status}):\n{tail}") from None
        finally:
            process.kill()
            process.wait()


def receive(stream: IO[bytes], columns: int) -> Episode | None:
    """The next episode, with a state of so many columns; None at the end of the stream, EOFError if it was cut off."""
    header = stream.read(MESSAGE.size)
    if len(header) < MESSAGE.size:
        raise EOFError
    count, height, width, level = MESSAGE.unpack(header)
    if count == 0:
        return None
    pixels, actions = stream.read(count * height * width * 3), stream.read(count * 8)
    states = stream.read(count * columns * 4)
    if len(actions) < count * 8 or len(states) < count * columns * 4:
        raise EOFError
    img = np.frombuffer(pixels, np.uint8).reshape(count, height, width, 3)
    state = np.frombuffer(states, np.float32).reshape(count, columns) if columns else None
    return Episode(img, np.frombuffer(actions, np.int64), level, state)


def procgen_home() -> Path:
    """Where the environment with procgen is, or would be created."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfwm"
    return cache / f"{REQUIREMENT.replace('==', '-')}-python{sys.version_info[0]}.{sys.version_info[1]}"


def procgen_python() -> Path:
    """The interpreter of an environment with procgen, which is created in the user's cache on first use."""
    if sys.version_info[:2] not in PYTHONS:
        raise RuntimeError(
            f"CoinRun's package {REQUIREMENT} has wheels for Python 3.11 and 3.12, not {platform.python_version()}; "
            "collect doom or atari:<Game> instead"
        )
    home = procgen_home()
    cache = home.parent
    if not (home / "complete").exists():
        print(f"creating an environment for {REQUIREMENT} in {home} (once)", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        # Created beside its place and renamed when complete, so that two processes do not delete each other's.
        partial = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=cache))
        try:
            run_step([sys.executable, "-m", "venv", str(partial)])
            pip = [str(partial / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
            run_step([*pip, "install", "--quiet", REQUIREMENT, "numpy<2"])
            (partial / "complete").touch()
            try:
                if not (home / "complete").exists():
                    shutil.rmtree(home, ignore_errors=True)
                partial.rename(home)
            except OSError:
                # Another process was first: use its environment.
                if not (home / "complete").exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return home / "bin" / "python"


def run_step(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-8:])
        raise RuntimeError(
            f"CoinRun needs an environment of its own for {REQUIREMENT}, and `{' '.join(command)}` failed; "
            f"doom and atari:<Game> need none. Its last lines:\n{tail}"
        )
