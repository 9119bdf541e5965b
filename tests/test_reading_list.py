"""The presets of the reading list: each trains, resumes, is exported and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfwm.data import Replay, ReplayWriter
from mfwm.data.replay import Clips
from mfwm.export import export, load_exported
from mfwm.models.cost import cost_of
from mfwm.presets import PRESETS
from mfwm.reading_list import READING_LIST
from mfwm.training import for_replay, load_model, train
from mfwm.training.run_log import read_log


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Random pixels, and random ids at every size, by whether they are ids."""
    place, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    pixels = ReplayWriter(place / "pixels", 64, 64, actions=15)
    ids = ReplayWriter(place / "ids", 8, 8, actions=15, vocabulary=1000, low_factors=(2, 4))
    for _ in range(4):
        actions = rng.integers(0, 15, 24)
        pixels.append(rng.integers(0, 256, (24, 64, 64, 3)).astype(np.uint8), actions)
        low = {factor: rng.integers(0, 1000, (24, 8 // factor, 8 // factor)) for factor in (2, 4)}
        ids.append(rng.integers(0, 1000, (24, 8, 8)), actions, low_tokens=low)
    return {False: place / "pixels", True: place / "ids"}


@pytest.mark.parametrize("name", READING_LIST)
def test_a_preset_trains_resumes_and_is_exported(name: str, sets: dict[bool, Path], tmp_path: Path) -> None:
    assert PRESETS[name] is READING_LIST[name]
    preset = READING_LIST[name]
    data = sets[preset.model.heads.output == "tokens"]
    options: dict[str, Any] = {"steps": 2, "batch": 1, "checkpoint_every": 1, "held_out": 0.3, "tensorboard": False}
    config = for_replay(replace(preset, data=str(data), **options), Replay(data))
    # The sizes that the preset states are those of the data, so that what describes the preset describes the run.
    assert config.model == preset.model
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=1)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(np.isfinite(row["loss"]) for row in read_log(tmp_path / "run" / "log.jsonl"))
    export(tmp_path / "run", tmp_path / "model.safetensors")
    exported, of_run, _ = load_exported(tmp_path / "model.safetensors")
    assert of_run.model == config.model
    clips = Clips(Replay(data), 12).batch(np.array([0]))
    given = (clips["video"], clips["actions"])
    for a, b in zip(exported.predict(*given), load_model(tmp_path / "run")[0].predict(*given), strict=True):
        assert torch.equal(a, b)
    cost = cost_of(config.model)
    assert 0 < cost.head_flops < cost.flops and cost.head_parameters < cost.parameters
