"""mfwm collect: records CoinRun (and the other procgen games), Atari or Doom, played by a random policy.

The policy holds each action for several frames, because an agent with a new action at every frame hardly moves. Frames
are resized to size x size by box averages (Pillow's BOX filter). Episodes are written one by one, beside `out`, and
become the replay buffer together.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..progress import Progress
from . import coinrun_recorder
from .coinrun_recorder import GAMES, MESSAGE, REQUIREMENT, HeldActions
from .place import Place, location
from .replay_writer import ReplayWriter

PROCGEN_PYTHONS = ((3, 11), (3, 12))
DOOM_SCENARIOS = ("my_way_home", "basic", "health_gathering", "deadly_corridor", "defend_the_center", "take_cover")


@dataclass
class Episode:
    """img uint8 [T, H, W, 3]; action int64 [T], action[t] taken at img[t]; level: the level's seed, or None."""

    img: np.ndarray
    action: np.ndarray
    level: int | None


def collect(
    env: str,
    frames: int,
    out: str | Path,
    *,
    seed: int = 0,
    size: int = 64,
    action_repeat: int = 4,
    num_levels: int = 500,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Record `frames` frames of `env` into the replay buffer `out`.

    Args:
        env: "coinrun" or another procgen game, "atari:<Game>" such as "atari:Breakout", "doom" or "doom:<scenario>".
        frames: number of frames over all episodes; the last episode may be cut short.
        out: a directory that is empty or does not exist, or a URL that fsspec supports. With `overwrite`, a replay
            buffer there stays until the new one is complete and replaces it.
        size: side of the square frames, in pixels.
        action_repeat: each action is held for 1 to this many frames.
        num_levels: number of procgen levels to play.
    """
    for name, value, least in (
        ("frames", frames, 1),
        ("seed", seed, 0),
        ("size", size, 1),
        ("action_repeat", action_repeat, 1),
        ("num_levels", num_levels, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
        if value >= 2**31:
            raise ValueError(f"{name} must be less than 2**31, got {value}")
    source = source_of(env)
    # Raise before an environment is started.
    Place(location(out), overwrite=overwrite)
    episodes = source(env, frames, seed, action_repeat, num_levels)
    description: dict[str, Any] = next(episodes)  # type: ignore[assignment]
    bar = Progress(f"collect {env}", frames, "frame", shown=progress)
    writer = ReplayWriter(
        out, size, size, actions=len(description["action_names"]), env=env, action_repeat=action_repeat, seed=seed,
        overwrite=overwrite, **description,
    )  # fmt: skip
    with closing(episodes), bar, writer:
        for episode in episodes:
            count = min(len(episode.img), frames - writer.frames)
            writer.append(resized(episode.img[:count], size), episode.action[:count], episode.level)
            bar.update(count)
            if writer.frames >= frames:
                return
        raise RuntimeError(f"{env} produced {writer.frames} of {frames} frames")


def source_of(env: str) -> Any:
    """The generator for `env`: it yields a description, then episodes."""
    name, _, rest = env.partition(":")
    if env in GAMES:
        return procgen_episodes
    if name == "atari" and rest:
        return atari_episodes
    if name == "doom" and (not rest or rest in DOOM_SCENARIOS):
        return doom_episodes
    raise ValueError(
        f"env must be one of {', '.join(GAMES)}, atari:<Game>, doom or doom:<{' | '.join(DOOM_SCENARIOS)}>; got {env!r}"
    )


def default_environment() -> str:
    """CoinRun if its package has a wheel for this Python, else Doom, with a printed reason."""
    if sys.version_info[:2] in PROCGEN_PYTHONS and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        return "coinrun"
    print(
        f"CoinRun's package has no wheel for Python {platform.python_version()} on {platform.platform()}: "
        "collecting Doom instead"
    )
    return "doom"


def resized(img: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, size, size, 3] from [T, H, W, 3]."""
    if img.shape[1:3] == (size, size):
        return img
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BOX)) for f in img])


def procgen_episodes(env: str, frames: int, seed: int, action_repeat: int, num_levels: int) -> Iterator[Any]:
    if (seed + 1) * num_levels >= 2**31:
        raise ValueError(f"seed must be less than {2**31 // num_levels - 1} for {num_levels} levels, got {seed}")
    python = procgen_python()
    settings = {
        "frames": frames, "seed": seed, "action-repeat": action_repeat, "num-levels": num_levels,
        "start-level": seed * num_levels,
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
            yield json.loads(first)
            while (episode := receive(process.stdout)) is not None:
                yield episode
        except EOFError:
            status = process.wait()
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"the {env} recorder stopped early (exit status {status}):\n{tail}") from None
        finally:
            process.kill()
            process.wait()


def receive(stream: IO[bytes]) -> Episode | None:
    """The next episode; None at the end of the stream, EOFError if it was cut off."""
    header = stream.read(MESSAGE.size)
    if len(header) < MESSAGE.size:
        raise EOFError
    count, height, width, level = MESSAGE.unpack(header)
    if count == 0:
        return None
    pixels, actions = stream.read(count * height * width * 3), stream.read(count * 8)
    if len(actions) < count * 8:
        raise EOFError
    img = np.frombuffer(pixels, np.uint8).reshape(count, height, width, 3)
    return Episode(img, np.frombuffer(actions, np.int64), level)


def procgen_python() -> Path:
    """The interpreter of an environment with procgen, which is created in the user's cache on first use."""
    if sys.version_info[:2] not in PROCGEN_PYTHONS:
        raise RuntimeError(
            f"CoinRun's package {REQUIREMENT} has wheels for Python 3.11 and 3.12, not {platform.python_version()}; "
            "collect doom or atari:<Game> instead"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfwm"
    home = cache / f"{REQUIREMENT.replace('==', '-')}-python{sys.version_info[0]}.{sys.version_info[1]}"
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


def atari_episodes(env: str, frames: int, seed: int, action_repeat: int, num_levels: int) -> Iterator[Any]:
    try:
        from ale_py import ALEInterface, LoggerMode, __version__, roms
    except ImportError as error:
        raise ImportError("collecting Atari needs the package ale-py: pip install 'mfwm-kernels[data]'") from error
    ALEInterface.setLoggerMode(LoggerMode.Error)
    game = env.partition(":")[2]
    known = {"".join(part.capitalize() for part in rom.split("_")): rom for rom in roms.get_all_rom_ids()}
    if game not in known:
        raise ValueError(f"env must be atari:<Game> with one of {', '.join(sorted(known))}; got {env!r}")
    ale = ALEInterface()
    ale.setInt("random_seed", seed)
    # The default, 0.25, sometimes repeats the last action instead, so the recorded action would not be the one taken.
    ale.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path(known[game])
    assert rom is not None
    ale.loadROM(rom)
    legal = ale.getMinimalActionSet()
    yield {
        "action_names": [action.name for action in legal], "noop": 0, "ticks_per_frame": 4,
        "package": "ale-py", "package_version": __version__,
    }  # fmt: skip
    policy = HeldActions(np.ones(len(legal)), action_repeat, 1, np.random.default_rng(seed))
    left = frames
    while left > 0:
        ale.reset_game()
        img, action = [], []
        before = screen = ale.getScreenRGB()
        while not ale.game_over() and left > 0:
            taken = int(policy.next()[0])
            # The console draws some objects on every other tick only, so take the maximum of two, as is usual.
            img.append(np.maximum(before, screen))
            action.append(taken)
            for _ in range(4):
                ale.act(legal[taken])
                before, screen = screen, ale.getScreenRGB()
            left -= 1
        yield Episode(np.stack(img), np.array(action), None)


def doom_episodes(env: str, frames: int, seed: int, action_repeat: int, num_levels: int) -> Iterator[Any]:
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("collecting Doom needs the package vizdoom: pip install 'mfwm-kernels[data]'") from error
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, (env.partition(":")[2] or DOOM_SCENARIOS[0]) + ".cfg"))
    game.set_window_visible(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_seed(seed)
    # Doom writes its settings to a file: keep it out of the user's working directory.
    settings = tempfile.TemporaryDirectory()
    game.set_doom_config_path(os.path.join(settings.name, "vizdoom.ini"))
    # The engine also creates a directory _vizdoom where it is started.
    before = os.getcwd()
    os.chdir(settings.name)
    try:
        game.init()
    finally:
        os.chdir(before)
    try:
        buttons = [button.name for button in game.get_available_buttons()]
        yield {
            "action_names": ["NOOP", *buttons], "noop": 0, "ticks_per_frame": 4, "package": "vizdoom",
            "package_version": vizdoom.__version__,
        }  # fmt: skip
        policy = HeldActions(np.array([0.2] + [1.0] * len(buttons)), action_repeat, 1, np.random.default_rng(seed))
        pressed = np.eye(len(buttons) + 1)[:, 1:].tolist()
        left = frames
        while left > 0:
            game.new_episode()
            img, action = [], []
            while not game.is_episode_finished() and left > 0:
                taken = int(policy.next()[0])
                img.append(game.get_state().screen_buffer.copy())
                action.append(taken)
                game.make_action(pressed[taken], 4)
                left -= 1
            yield Episode(np.stack(img), np.array(action), None)
    finally:
        game.close()
        settings.cleanup()
