"""A walk through a world model: one frame after another, with what every horizon expects and how far off it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.tokens import TOP_K
from ..models.foresight import Foresight
from ..models.rollouts import disagreement
from ..training.trainer import autocast_dtype
from .pictures import TokenPictures, as_bytes
from .starts import Start, frames_of, picture_of
from .world import World


@dataclass
class Moment:
    """What is shown at a step. Pictures are uint8 [H, W, 3], those of a panel at 1/factor of the size.

    step: frames since the start, which is the only real one, step 0.
    expected: what each panel expects `offset` frames from here, under the plan.
    past: what it had expected of this frame, and the error of that; None and NaN where the actions in between were
        others than planned, or there was no start yet.
    """

    step: int
    frame: np.ndarray
    expected: list[np.ndarray]
    past: list[np.ndarray | None]
    errors: list[float]


@dataclass
class Forecast:
    """What a panel expects of a later frame, if the actions in between are those of the plan."""

    plan: list[Any]
    prediction: Tensor
    picture: np.ndarray


class Session:
    """A walk that `reset` starts and `step` continues.

    Drawn tokens and frames depend on the seed, the start and the actions since: a reset restarts the generator.
    """

    def __init__(self, world: World, seed: int, temperature: float | None = None) -> None:
        self.world, self.seed = world, seed
        # Greedy tokens can freeze a rollout, and the mean of a distribution is its best single picture.
        self.temperature = (1.0 if world.model.tokens else 0.0) if temperature is None else temperature
        self.generator = torch.Generator(world.device)
        self.tokens = None if world.tokenizer is None else TokenPictures(world.tokenizer)
        self.longest = max(panel.offset for panel in world.panels)
        self.rollout: Foresight | None = None

    def reset(self, start: Start, plan: Sequence[Any]) -> Moment:
        """Begin at a real frame."""
        frames, actions = frames_of(self.world, start)
        return self.begin(frames, actions, picture_of(self.world.pictures, start), plan)

    def begin_at(self, pictures: np.ndarray, actions: Sequence[Any], plan: Sequence[Any]) -> Moment:
        """Begin at the last of these pictures, uint8 [T, H, W, 3], with the T - 1 actions between them."""
        video = torch.from_numpy(pictures)[None].permute(0, 1, 4, 2, 3).to(self.world.device)
        if self.world.tokenizer is not None:
            with self._inference():
                video = self.world.tokenizer.encode(video)
        return self.begin(video, self._tensor(actions), pictures[-1], plan)

    def begin(self, frames: Tensor, actions: Tensor | None, picture: np.ndarray, plan: Sequence[Any]) -> Moment:
        """Begin at the last of these frames [1, T, ...], with the actions [1, T - 1] between them."""
        self.generator.manual_seed(self.seed)
        options: dict[str, Any] = {"temperature": self.temperature, "generator": self.generator}
        if self.world.model.tokens:
            options["top_k"] = TOP_K
        with self._inference():
            self.rollout = Foresight(self.world.model, frames, actions, **options)
        if self.tokens is not None:
            self.tokens.begin(frames)
        self.number, self.frame = 0, picture
        # By step: what panel i expects of it. By step: the action taken at it.
        self.pending: dict[int, dict[int, Forecast]] = {}
        self.taken: dict[int, Any] = {}
        self.past: dict[int, Forecast] = {}
        self.errors = [float("nan")] * len(self.world.panels)
        return self.look(plan)

    def heat(self, temperature: float) -> None:
        """Draw later frames at this temperature."""
        self.temperature = temperature
        if self.rollout is not None:
            self.rollout.sampling = (temperature, *self.rollout.sampling[1:])

    def look(self, plan: Sequence[Any]) -> Moment:
        """The same frame, with what is expected under another plan: the actions from here on, `longest` of them."""
        assert self.rollout is not None
        with self._inference():
            predictions = self.rollout.expect(self._tensor(plan[: self.longest]))
            chosen = [predictions[panel.index] for panel in self.world.panels]
            pictures = self._panel_pictures(chosen)
        for i, panel in enumerate(self.world.panels):
            forecast = Forecast(list(plan[: panel.offset]), chosen[i], pictures[i])
            self.pending.setdefault(self.number + panel.offset, {})[i] = forecast
        past = [self.past[i].picture if i in self.past else None for i in range(len(self.world.panels))]
        return Moment(self.number, self.frame, pictures, past, self.errors)

    def step(self, action: Any, plan: Sequence[Any]) -> Moment:
        """Take an action, and look at what is expected under `plan` from the next frame on."""
        assert self.rollout is not None
        with self._inference():
            frame = self.rollout.advance(self._tensor([action]))
            if self.tokens is not None:
                self.tokens.add(frame)
            self.frame = self._picture(frame)
            self.taken[self.number] = action
            self.number += 1
            self.past = self._came_true()
            self.errors = [float("nan")] * len(self.world.panels)
            for i, forecast in self.past.items():
                factor = self.world.panels[i].factor
                self.errors[i] = float(disagreement(self.world.model, forecast.prediction, frame, factor))
        self.taken.pop(self.number - self.longest - 1, None)
        return self.look(plan)

    def _came_true(self) -> dict[int, Forecast]:
        """The forecasts of this frame whose actions were taken."""
        found = {}
        for i, forecast in self.pending.pop(self.number, {}).items():
            first = self.number - self.world.panels[i].offset
            if forecast.plan == [self.taken[step] for step in range(first, self.number)]:
                found[i] = forecast
        return found

    def _tensor(self, actions: Sequence[Any]) -> Tensor | None:
        """[1, P] ids or [1, P, A] numbers."""
        if self.world.actions.kind == "none":
            return None
        dtype = torch.int64 if self.world.actions.kind == "discrete" else torch.float32
        return torch.tensor([list(actions)], dtype=dtype, device=self.world.device)

    def _picture(self, frame: Tensor) -> np.ndarray:
        return as_bytes(frame[0, 0]) if self.tokens is None else self.tokens.newest()

    def _panel_pictures(self, predictions: list[Tensor]) -> list[np.ndarray]:
        if self.tokens is None:
            return [as_bytes(prediction[0, 0]) for prediction in predictions]
        return self.tokens.expected(predictions, [panel.factor for panel in self.world.panels])

    def _inference(self) -> Any:
        return Inference(self.world.device)


class Inference:
    """Inference mode, in bf16 where the device multiplies it."""

    def __init__(self, device: torch.device) -> None:
        dtype = autocast_dtype("auto", device)
        self.modes = (torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32))

    def __enter__(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)
