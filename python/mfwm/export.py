"""mfwm export: writes the weights of a run as one safetensors file, with its config and step in the header."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model

from .models.world_model import WorldModel
from .training.checkpoints import written_beside
from .training.run_config import from_tree, parsed
from .training.world_model import TrainingConfig, load_model


def export(run: Path, out: Path) -> None:
    """Write the weights of a run's newest checkpoint (their moving average, if it has one) to `out`.

    FileExistsError if `out` exists.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists: choose another file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out must be in a directory that exists, got {out}")
    model, config, step = load_model(run)
    header = {"config": json.dumps(dataclasses.asdict(config)), "step": str(step)}
    try:
        with written_beside(out) as unfinished:
            save_model(model, str(unfinished), header)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{out} could not be written: {error}") from error


def load_exported(path: Path) -> tuple[WorldModel, TrainingConfig, int]:
    """The model of an exported file, and the config and step of its run."""
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if "config" not in header:
        raise ValueError(f"{path} was not written by `mfwm export`: its header has no config")
    where = f"{path}, config"
    config = from_tree(TrainingConfig, parsed(header["config"], where), where)
    step = header.get("step", "")
    if not re.fullmatch("[0-9]+", step):
        raise ValueError(f"{path}: step must be a number, got {step!r}")
    model = WorldModel(config.model)
    try:
        load_weights(model, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of its config: {error}") from error
    return model.eval(), config, int(step)
