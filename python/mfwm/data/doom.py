"""Doom for `mfwm collect`, with the player's position, speed and angle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from .coinrun_recorder import HeldActions
from .recording import Episode, Recording

SCENARIOS = ("my_way_home", "basic", "health_gathering", "deadly_corridor", "defend_the_center", "take_cover")
TICKS = 4
# The column's name, the engine's name, and the unit. The angle is 0 where x grows, and 90 where y grows.
STATE = (
    ("x", "POSITION_X", "map units"),
    ("y", "POSITION_Y", "map units"),
    ("z", "POSITION_Z", "map units"),
    ("angle", "ANGLE", "degrees"),
    ("vx", "VELOCITY_X", "map units/tick"),
    ("vy", "VELOCITY_Y", "map units/tick"),
)


def started(env: str, seed: int) -> tuple[Any, Any]:
    """A game of vizdoom that runs, and the temporary directory to clean up once it is closed."""
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("Doom needs the package vizdoom: pip install 'mfwm-kernels[data]'") from error
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, (env.partition(":")[2] or SCENARIOS[0]) + ".cfg"))
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
    return game, settings


def pressed(buttons: int) -> list[list[float]]:
    """By action, which buttons are pressed: none of them in the first action, then each on its own."""
    return np.eye(buttons + 1)[:, 1:].tolist()


def doom_episodes(env: str, recording: Recording) -> Iterator[Any]:
    game, settings = started(env, recording.seed)
    import vizdoom

    try:
        buttons = [button.name for button in game.get_available_buttons()]
        ticks = TICKS * recording.frame_skip
        yield {
            "action_names": ["NOOP", *buttons], "noop": 0, "ticks_per_frame": ticks, "package": "vizdoom",
            "package_version": vizdoom.__version__,
            "state_names": [name for name, _, _ in STATE], "state_units": [unit for _, _, unit in STATE],
        }  # fmt: skip
        variables = [getattr(vizdoom.GameVariable, name) for _, name, _ in STATE]
        weights = np.array([0.2] + [1.0] * len(buttons))
        policy = HeldActions(weights, recording.action_repeat, 1, np.random.default_rng(recording.seed))
        presses = pressed(len(buttons))
        left = recording.frames
        while left > 0:
            game.new_episode()
            img, action, states = [], [], []
            while not game.is_episode_finished() and left > 0:
                taken = int(policy.next()[0])
                img.append(game.get_state().screen_buffer.copy())
                states.append([game.get_game_variable(variable) for variable in variables])
                action.append(taken)
                game.make_action(presses[taken], ticks)
                left -= 1
            yield Episode(np.stack(img), np.array(action), None, np.array(states, np.float32))
    finally:
        game.close()
        settings.cleanup()
