"""Rollouts: frames that a world model makes from its own frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfwm_kernels import arguments as check
from mfwm_kernels import video_pyramid

from .blocks import TimeCache
from .maskgit import sample, sample_frame

if TYPE_CHECKING:
    from .world_model import WorldModel

# The action at the last of the frames [B, V, ...] so far, [B] or [B, A].
Policy = Callable[[Tensor], Tensor]


def random_actions(model: WorldModel, generator: torch.Generator | None = None) -> Policy:
    """A policy of uniform ids, or of normal vectors."""

    def act(frames: Tensor) -> Tensor:
        config, device = model.config, frames.device
        if config.actions:
            return torch.randint(config.actions, frames.shape[:1], generator=generator, device=device)
        return torch.randn(frames.shape[0], config.action_size, generator=generator, device=device)

    return act


class Memory:
    """The last frames and actions, and what the trunk has made of them: a new frame costs one position.

    A model with a window goes on for ever. Of another, the trunk starts anew from the last `keep` frames where the
    context is full. Either way memory stays flat, and what comes out is what the model gives without a cache.
    """

    def __init__(self, model: WorldModel, keep: int, cached: bool):
        self.model, self.keep, self.cached = model, keep, cached
        config, blocks = model.config, max(model.config.heads.blocks or (0,))
        # States that the heads read: without blocks the last one alone. And frames to make these anew from, with one
        # more for the action before the first.
        self.states_read = 1 if not blocks else config.context
        self.frames_read = config.context
        if config.window is not None:
            self.states_read = 1 + blocks * (config.window - 1)
            self.frames_read = 1 + self.states_read + config.layers * (config.window - 1)
        self.frames: Tensor | None = None
        self.actions: Tensor | None = None
        # Of these frames, those in the caches.
        self.known = 0
        self.caches = [TimeCache(config.context, config.window) for _ in model.layers]
        self.states: dict[str, Tensor] = {}

    def _forget(self) -> None:
        self.known, self.states = 0, {}
        for cache in self.caches:
            cache.rewind(0)

    def remember(self, frames: Tensor, actions: Tensor | None) -> None:
        """Add frames [B, n, ...], with the action at each."""
        self.frames = frames if self.frames is None else torch.cat([self.frames, frames], dim=1)
        if actions is not None:
            self.actions = actions if self.actions is None else torch.cat([self.actions, actions], dim=1)

    def _hold(self, count: int) -> None:
        """Let go of all frames but the last `count`."""
        assert self.frames is not None
        self.known -= max(0, self.frames.shape[1] - count)
        self.frames = self.frames[:, -count:]
        self.actions = None if self.actions is None else self.actions[:, -count:]

    def _make_room(self, more: int) -> None:
        """So that the frames, and `more`, are within what the trunk can read at once."""
        assert self.frames is not None
        if self.model.config.window is not None:
            if not self.cached:
                self._hold(self.frames_read)
        elif self.frames.shape[1] + more > self.model.config.context:
            self._hold(self.keep)
            self._forget()
        if not self.cached:
            self._forget()

    def read(self, candidate: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The heads' hidden, near_hidden and inputs at the last positions.

        With candidate [B, 1, ...], tokens of the frame that follows, of which mask [B, 1, H, W] are not known, they end
        at that frame, which is not remembered.
        """
        self._make_room(0 if candidate is None else 1)
        assert self.frames is not None
        taken = self.model.action_embeddings(self.actions)
        if self.frames.shape[1] > self.known:
            self.states = self._extended(self.frames[:, self.known :], taken, self.known)
            self.known = self.frames.shape[1]
        states = self.states
        if candidate is not None:
            length = self.caches[0].length
            states = self._extended(candidate, taken, self.known, mask)
            for cache in self.caches:
                cache.rewind(length)
        # A policy sees a whole context.
        if self.model.config.window is not None and self.cached:
            self._hold(max(self.model.config.context, self.states_read))
        return states

    def _extended(
        self, frames: Tensor, taken: Tensor | None, first: int, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        part = None if taken is None else taken[:, first : first + frames.shape[1]]
        inputs = self.model.embedded(frames, part, mask)
        hidden, near_hidden = self.model.trunk(inputs, caches=self.caches)
        states = {"inputs": inputs, "hidden": hidden}
        if near_hidden is not None:
            states["near_hidden"] = near_hidden
        if self.states and self.states_read > 1:
            states = {name: torch.cat([self.states[name], x], dim=1) for name, x in states.items()}
        return {name: x[:, -self.states_read :] for name, x in states.items()}


class Roller:
    """A closed-loop rollout: gives one frame [B, 1, ...] after the other.

    Args:
        model: whose near horizon predicts the next frame, whole (or, masked, the frame itself).
        video: the frames to begin with; pixels as floating.
        actions: the action at every frame, real or generated, as far as they are given; None without actions.
        policy: gives the actions after these.
        keep: frames to go on from where the context is full, half of it by default. With as many as fit, each step from
            there on costs a whole context. A model with a window has no need of it.
        cached: whether past positions are kept; the results are the same.
        temperature: of tokens; 0 takes the most probable ones, of which a rollout may come to rest.
        top_k: tokens are drawn from that many most probable ones; None: from all.
        masked_steps: steps of MaskGIT sampling.
        generator: of the tokens drawn.
    """

    def __init__(
        self,
        model: WorldModel,
        video: Tensor,
        actions: Tensor | None,
        *,
        policy: Policy | None = None,
        keep: int | None = None,
        cached: bool = True,
        temperature: float = 0.0,
        top_k: int | None = None,
        masked_steps: int = 25,
        generator: torch.Generator | None = None,
    ):
        context = model.config.context
        most = context - model.config.masked
        if keep is not None and model.config.window is not None:
            raise ValueError(f"keep must be None for a model with a window, got {keep}")
        keep = max(1, context // 2) if keep is None else keep
        if not 1 <= keep <= most:
            raise ValueError(f"keep must be in 1..{most} for a context of {context}, got {keep}")
        self.model, self.actions, self.policy = model, actions, policy
        self.masked_steps = masked_steps
        self.drawing = (temperature, top_k, generator)
        self.memory = Memory(model, keep, cached)
        # The frame whose action is still to be taken, and how many stand before it.
        self.last, self.count = video[:, -1:], video.shape[1] - 1
        first = max(0, self.count + 1 - (most if model.config.window is None else self.memory.frames_read))
        if self.count > first:
            past = None if actions is None else actions[:, first : self.count]
            self.memory.remember(video[:, first:-1], past)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next frame."""
        self.memory.remember(self.last, self._action())
        self.count += 1
        self.last = self._masked_frame() if self.model.config.masked else self._near_frame()
        return self.last

    def _action(self) -> Tensor | None:
        if self.model.action is None:
            return None
        if self.actions is not None and self.count < self.actions.shape[1]:
            return self.actions[:, self.count : self.count + 1]
        assert self.policy is not None
        past = self.memory.frames
        return self.policy(self.last if past is None else torch.cat([past, self.last], dim=1))[:, None]

    def near(self, states: dict[str, Tensor]) -> Tensor:
        """What the near horizon predicts at the last position. It has no actions in between."""
        heads = self.model.heads
        if not (heads.config.blocks and heads.config.blocks[heads.first]):
            states = {name: x[:, -1:] for name, x in states.items()}
        hidden = states["hidden"]
        nothing = None if self.model.window_action is None else torch.zeros_like(hidden[:, :, 0, 0])
        return self._predict(states, nothing, near_only=True)[0]

    @torch.no_grad()
    def all_horizons(self) -> tuple[Tensor, ...]:
        """What each horizon predicts at the last position, with the actions that are given."""
        states, window = self.memory.read(), None
        if self.model.window_action is not None:
            assert self.memory.actions is not None
            known = self.memory.actions[:, -states["hidden"].shape[1] :]
            to_come = known[:, :0] if self.actions is None else self.actions[:, self.count :]
            window = self.model.window_action(torch.cat([known, to_come], dim=1))
        return self._predict(states, window, near_only=False)

    def _predict(self, states: dict[str, Tensor], window: Tensor | None, near_only: bool) -> tuple[Tensor, ...]:
        assert self.memory.frames is not None
        video = self.memory.frames[:, -states["hidden"].shape[1] :]
        predicted = self.model.heads.predict(video=video, actions=window, near_only=near_only, **states)  # type: ignore[arg-type]
        return tuple(x[:, -1:] for x in predicted)

    def _near_frame(self) -> Tensor:
        near = self.near(self.memory.read())
        return sample(near, *self.drawing) if self.model.tokens else near

    def _masked_frame(self) -> Tensor:
        parts = self.model.config.frame[0]

        def logits_of(ids: Tensor, mask: Tensor) -> Tensor:
            candidate = ids[:, None] if parts > 1 else ids[:, None, ..., 0]
            logits = self.near(self.memory.read(candidate, mask[:, None]))[:, 0]
            return logits if parts > 1 else logits[..., None, :]

        ids = self.last[:, 0] if parts > 1 else self.last[:, 0, ..., None]
        drawn = sample_frame(logits_of, ids, self.masked_steps, *self.drawing)
        return drawn[:, None] if parts > 1 else drawn[:, None, ..., 0]


def check_drawing(temperature: float, top_k: int | None, masked_steps: int) -> None:
    check.number("temperature", temperature, least=0)
    check.integer("masked_steps", masked_steps, least=1)
    if top_k is not None:
        check.integer("top_k", top_k, least=1)


def check_rollout(model: WorldModel, video: Tensor, actions: Tensor | None, steps: int, policy: Policy | None) -> None:
    horizons, first = model.config.heads.horizons, 0 if model.config.masked else 1
    if (horizons.offsets[0], horizons.factors[0]) != (first, 1):
        raise ValueError(f"a rollout needs a near horizon of offset {first} and factor 1, got {horizons}")
    check.integer("steps", steps, least=1)
    check_actions(model, video, actions, video.shape[1] - 1 + (steps if policy is None else 0))


def check_actions(model: WorldModel, video: Tensor, actions: Tensor | None, needed: int) -> None:
    """Raise where the model does not take these, or actions do not cover the `needed` first frames."""
    model.check_inputs(video, actions)
    if model.action is None:
        return
    given = 0 if actions is None else actions.shape[1]
    if given < needed:
        raise ValueError(f"actions must cover frames 0..{needed - 1}, got {given} of them")
    if actions is not None and model.config.actions:
        check_range("actions", actions, model.config.actions)


def check_range(name: str, ids: Tensor, count: int) -> None:
    """Raise where ids are not in 0..count - 1."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise ValueError(f"{name} must be in 0..{count - 1}, got {wrong[0].item()}")


def as_frames(model: WorldModel, video: Tensor) -> Tensor:
    """Pixels as fp32 in [-1, 1]; tokens as they are."""
    return video if model.tokens else video_pyramid(video, (1,), dtype=torch.float32)[0]


def with_drift(roller: Roller, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames [B, 1, ...], and for each [B, K]: how far horizon i's prediction of it, made k_i frames earlier, is off.

    As in `disagreement`; NaN where the rollout had not begun, where the actions in between were not given, and at
    offset 0.
    """
    model, horizons = roller.model, roller.model.config.heads.horizons
    waiting: dict[int, dict[int, Tensor]] = {}
    given = 0 if roller.actions is None else roller.actions.shape[1]
    for _ in range(steps):
        frame = roller.step()
        last = roller.count - 1
        for i, (offset, prediction) in enumerate(zip(horizons.offsets, roller.all_horizons(), strict=True)):
            if offset > 0 and (model.window_action is None or last + offset <= given):
                waiting.setdefault(last + offset, {})[i] = prediction
        drift = torch.full((len(frame), len(horizons)), torch.nan, device=frame.device)
        for i, prediction in waiting.pop(last + 1, {}).items():
            drift[:, i] = disagreement(model, prediction, frame, horizons.factors[i])
        yield frame, drift


def disagreement(model: WorldModel, prediction: Tensor, frame: Tensor, factor: int) -> Tensor:
    """[B], of a horizon's prediction and the frame [B, 1, ...] that came, whole.

    The mean squared difference at 1/factor; for tokens the mean cross-entropy, in nats, of the ids under the logits
    of the cells that cover them.
    """
    if not model.tokens:
        (small,) = video_pyramid(frame, (factor,))
        return (small - prediction).square().flatten(1).mean(1)
    rows = prediction.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return -rows.log_softmax(-1).gather(-1, frame[..., None].long()).flatten(1).mean(1)


def in_jumps(model: WorldModel, video: Tensor, actions: Tensor | None, count: int, horizon: int) -> Iterator[Tensor]:
    """Frames [B, 1, C, height / f, width / f], each k frames after the one before, k and f those of `horizon`.

    One pass a jump instead of k. What the trunk then remembers of the k frames is what the horizons up to this one
    predict of them, enlarged, and in between a mix of the two nearest.
    """
    horizons, context = model.config.heads.horizons, model.config.context
    stride = horizons.offsets[horizon]
    frames = as_frames(model, video)
    seen = frames.shape[1]
    for _ in range(count):
        start = max(0, frames.shape[1] - context)
        window = None if actions is None else actions[:, seen - (frames.shape[1] - start) : seen - 1 + stride]
        predicted = [x[:, -1:] for x in model.predict(frames[:, start:], window)]
        known = {0: frames[:, -1]}
        for i in range(horizon + 1):
            enlarged = predicted[i][:, 0]
            factor = horizons.factors[i]
            known.setdefault(horizons.offsets[i], enlarged.repeat_interleave(factor, -1).repeat_interleave(factor, -2))
        filled = []
        for ahead in range(1, stride + 1):
            before, after = max(k for k in known if k <= ahead), min(k for k in known if k >= ahead)
            share = (ahead - before) / max(1, after - before)
            filled.append(torch.lerp(known[before], known[after], share))
        frames = torch.cat([frames, torch.stack(filled, dim=1)], dim=1)[:, -context:]
        seen += stride
        yield predicted[horizon]
