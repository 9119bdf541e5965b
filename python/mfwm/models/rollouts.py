"""Rollouts: frames that a world model predicts from its own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfwm_kernels import arguments as check
from mfwm_kernels import video_pyramid

from ..checks import check_ids
from .blocks import TimeCache
from .distributions import check_sampling
from .maskgit import sample_frame
from .upsampler import enlarged
from .world_model import WorldModel

# Maps the frames so far, [B, V, ...], to the action to take at the last one, [B] or [B, A].
Policy = Callable[[Tensor], Tensor]


def random_actions(model: WorldModel, generator: torch.Generator | None = None) -> Policy:
    """A policy of uniform ids, or of normal vectors."""

    def act(frames: Tensor) -> Tensor:
        config, device = model.config, frames.device
        if config.actions:
            return torch.randint(config.actions, frames.shape[:1], generator=generator, device=device)
        return torch.randn(frames.shape[0], config.action_size, generator=generator, device=device)

    return act


@torch.no_grad()
def rollout(model: WorldModel, video: Tensor, actions: Tensor | None, steps: int, **options: Any) -> Tensor:
    """The `steps` frames [B, steps, ...] that follow `video` in a closed loop; pixels in [-1, 1].

    Arguments and options are those of Rollout.
    """
    return torch.cat(list(Rollout(model, video, actions, steps, **options)), dim=1)


@torch.no_grad()
def rollout_with_drift(
    model: WorldModel, video: Tensor, actions: Tensor | None, steps: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """The rollout, and its drift [B, steps, K]: the error of each horizon's earlier prediction against each frame.

    Entry [b, s, i] compares frame s with what horizon i predicted for it k_i frames earlier, as in `disagreement`. It
    needs no ground truth, and grows as a rollout drifts. It is NaN where that prediction would have been made before
    the rollout began, where the actions in between were not given, and at offset 0.
    """
    heads = model.config.heads
    if heads.conditioning == "frames" or heads.token_targets == "tokenised":
        raise ValueError(
            "drift needs far horizons that forecast from what has been seen, and predict what the frame shows: got "
            f'conditioning "{heads.conditioning}", token_targets "{heads.token_targets}"'
        )
    running = Rollout(model, video, actions, steps, **options)
    pairs = list(with_drift(running))
    return torch.cat([frame for frame, _ in pairs], dim=1), torch.stack([drift for _, drift in pairs], dim=1)


@torch.no_grad()
def rollout_in_jumps(
    model: WorldModel,
    video: Tensor,
    actions: Tensor | None,
    jumps: int,
    horizon: int,
    *,
    full_size: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frames [B, jumps, C, height / f, width / f], each k frames after the one before; k and f are those of `horizon`.

    Each jump takes one pass of the model, where a rollout takes k. actions: [B, T0 - 1 + jumps * k or more] for T0
    frames of video. The trunk reads approximations of the k frames jumped over: what the horizons up to `horizon`
    predict of them, enlarged to full size, and for the others an interpolation of the two nearest.

    Args:
        full_size: with an upsampler and `horizon` 1, of which it computes horizon 0: frames at full size, each from the
            small prediction and the last frame of `video`, however many jumps lie between them.
        temperature, generator: of horizons that predict distributions or have latents, as in MultiFrameHeads.predict.
    """
    horizons = model.config.heads.horizons
    if model.tokens or model.config.heads.conditioning == "frames":
        raise ValueError("jumps need pixels or latents, and far horizons that forecast from what has been seen")
    if not 0 <= horizon < len(horizons) or horizons.offsets[horizon] < 1:
        raise ValueError(f"horizon must be the index of an offset above 0 in {horizons}, got {horizon}")
    check.integer("jumps", jumps, least=1)
    if check.flag("full_size", full_size) and (model.heads.upsampler is None or horizon != 1):
        raise ValueError(
            f"full_size needs a model with an upsampler, and horizon 1, which that enlarges; got horizon {horizon} and "
            f"upsampler {model.config.heads.upsampler}"
        )
    check_actions(model, video, actions, jumps * horizons.offsets[horizon])
    draws = {"temperature": temperature, "generator": generator}
    frames = as_frames(model, video)
    small = torch.cat(list(in_jumps(model, frames, actions, jumps, horizon, draws)), dim=1)
    if not full_size:
        return small
    found = model.heads.upsampled(small, frames[:, -1:].expand(-1, jumps, -1, -1, -1))
    return found.clamp(-1, 1) if model.config.heads.output == "pixels" else found


class Rollout:
    """A closed-loop rollout of `steps` frames [B, 1, ...], one per step(); iterating over it takes all the steps.

    Args:
        model: its near horizon predicts the next frame at full size (in a masked model, the frame itself).
        video: the frames to start from, T0 of them.
        actions: [B, T0 + steps - 1 or more], the action taken at every frame, real or generated; fewer with a policy.
            None for a model without actions.
        policy: chooses the actions that are missing.
        keep: how many frames to restart from when the context is full; half of it by default. With as many as fit, each
            later step runs the trunk on a whole context. A model with a window needs no restart.
        cached: whether the trunk's keys and values of past positions are cached; the results are the same.
        temperature: of token sampling; 0 is greedy, which can freeze a rollout. Of a near horizon that predicts a
            distribution of frames: 0 takes its mean, 1 a sample, in which every element is drawn on its own.
        top_k: sample only from that many most likely tokens; None: from all.
        masked_steps: steps of MaskGIT sampling.
        generator: for sampling.
    """

    def __init__(
        self,
        model: WorldModel,
        video: Tensor,
        actions: Tensor | None,
        steps: int,
        *,
        policy: Policy | None = None,
        keep: int | None = None,
        cached: bool = True,
        temperature: float = 0.0,
        top_k: int | None = None,
        masked_steps: int = 25,
        generator: torch.Generator | None = None,
    ):
        check_near_horizon(model)
        check.integer("steps", steps, least=1)
        check_actions(model, video, actions, steps if policy is None else 0)
        check_sampling(temperature, generator, video)
        check.integer("masked_steps", masked_steps, least=1)
        if top_k is not None:
            check.integer("top_k", top_k, least=1)
        if temperature and not (model.tokens or model.heads.draws(near_only=True)):
            raise ValueError(
                "temperature must be 0 if the near horizon predicts neither tokens nor a distribution, got "
                f"{temperature}"
            )
        context = model.config.context
        most = context - model.config.masked
        if keep is not None and model.config.window is not None:
            raise ValueError(f"keep must be None for a model with a window, got {keep}")
        keep = max(1, context // 2) if keep is None else keep
        if not 1 <= keep <= most:
            raise ValueError(f"keep must be in 1..{most} for a context of {context}, got {keep}")
        self.model, self.actions, self.steps, self.policy = model, actions, steps, policy
        self.masked_steps = masked_steps
        self.sampling = (temperature, top_k, generator)
        self.memory = Memory(model, keep, cached)
        frames = as_frames(model, video)
        # The newest frame, whose action is still to be taken, and the number of frames before it.
        self.last, self.count = frames[:, -1:], frames.shape[1] - 1
        first = max(0, self.count + 1 - (most if model.config.window is None else self.memory.frames_read))
        if self.count > first:
            past = None if actions is None else actions[:, first : self.count]
            self.memory.append(frames[:, first:-1], past)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.step() for _ in range(self.steps))

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next frame."""
        self.memory.append(self.last, self._action())
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

    def near(self, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The near horizon's output at the last position, as from MultiFrameHeads.outputs. It needs no actions in
        between."""
        heads = self.model.heads
        if not (heads.config.blocks and heads.config.blocks[heads.first]):
            states = {name: x[:, -1:] for name, x in states.items()}
        hidden = states["hidden"]
        no_actions = None if self.model.window_action is None else torch.zeros_like(hidden[:, :, 0, 0])
        return self._outputs(states, no_actions, near_only=True)

    @torch.no_grad()
    def all_horizons(self) -> tuple[Tensor, ...]:
        """The prediction of every horizon at the last position, with the actions that are given."""
        states, window = self.memory.read(), None
        if self.model.window_action is not None:
            assert self.memory.actions is not None
            taken = self.memory.actions[:, -states["hidden"].shape[1] :]
            to_come = taken[:, :0] if self.actions is None else self.actions[:, self.count :]
            window = self.model.window_action(torch.cat([taken, to_come], dim=1))
        return self.model.heads.frames(self._outputs(states, window, near_only=False), self._last())

    def _outputs(self, states: dict[str, Tensor], window: Tensor | None, *, near_only: bool) -> tuple[Tensor, ...]:
        """Of the horizons at the last position."""
        assert self.memory.frames is not None
        video = self.memory.frames[:, -states["hidden"].shape[1] :]
        found = self.model.heads.outputs(video=video, actions=window, near_only=near_only, **states)  # type: ignore[arg-type]
        return tuple(x[:, -1:] for x in found)

    def _last(self) -> Tensor:
        assert self.memory.frames is not None
        return self.memory.frames[:, -1:]

    def _near_frame(self) -> Tensor:
        return self._drawn(self.near(self.memory.read()))

    def _drawn(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """The near frame that outputs of the near horizon give, or a sample of it."""
        temperature, _, generator = self.sampling
        if self.model.tokens:
            return self.model.heads.draw_ids(outputs, *self.sampling)
        return self.model.heads.frames(outputs, self._last(), temperature=temperature, generator=generator)[0]

    def _masked_frame(self) -> Tensor:
        several = self.model.config.frame[0] > 1  # ids per token

        def logits_of(ids: Tensor, mask: Tensor) -> Tensor:
            candidate = ids[:, None] if several else ids[:, None, ..., 0]
            outputs = self.near(self.memory.read(candidate, mask[:, None]))
            logits = self.model.heads.frames(outputs, candidate)[0][:, 0]
            return logits if several else logits[..., None, :]

        ids = self.last[:, 0] if several else self.last[:, 0, ..., None]
        sampled = sample_frame(logits_of, ids, self.masked_steps, *self.sampling)
        return sampled[:, None] if several else sampled[:, None, ..., 0]


class Memory:
    """The last frames and actions of a rollout, and the trunk's states of them: a new frame costs one position.

    With a window, a rollout can continue without end. Without one, the trunk restarts from the last `keep` frames when
    the context is full. Either way memory use stays constant, and the states are those that the trunk computes without
    a cache.
    """

    def __init__(self, model: WorldModel, keep: int, cached: bool):
        self.model, self.keep, self.cached = model, keep, cached
        config, blocks = model.config, max(model.config.heads.blocks or (0,))
        # states_read: how many states the heads read, only the last one without blocks. frames_read: how many frames it
        # takes to recompute them, plus one for the action before the first.
        self.states_read = 1 if not blocks else config.context
        self.frames_read = config.context
        if config.window is not None:
            self.states_read = 1 + blocks * (config.window - 1)
            self.frames_read = 1 + self.states_read + config.layers * (config.window - 1)
        self.frames: Tensor | None = None
        self.actions: Tensor | None = None
        # How many of these frames the caches cover.
        self.cached_frames = 0
        self.caches = [TimeCache(config.context, config.window) for _ in model.layers]
        self.states: dict[str, Tensor] = {}

    def append(self, frames: Tensor, actions: Tensor | None) -> None:
        """Add frames [B, n, ...], with the action at each."""
        self.frames = frames if self.frames is None else torch.cat([self.frames, frames], dim=1)
        if actions is not None:
            self.actions = actions if self.actions is None else torch.cat([self.actions, actions], dim=1)

    def read(self, candidate: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The hidden, near_hidden and inputs that the heads read, at the last positions.

        candidate: [B, 1, ...], the tokens of the frame that follows, with mask [B, 1, H, W] True where they are not
        known yet. The states then end at that frame, and it is not added to the memory.
        """
        self._make_room(0 if candidate is None else 1)
        assert self.frames is not None
        taken = self.model.action_embeddings(self.actions)
        if self.frames.shape[1] > self.cached_frames:
            self.states = self._extended(self.frames[:, self.cached_frames :], taken, self.cached_frames)
            self.cached_frames = self.frames.shape[1]
        states = self.states
        if candidate is not None:
            length = self.caches[0].length
            states = self._extended(candidate, taken, self.cached_frames, mask)
            for cache in self.caches:
                cache.rewind(length)
        # A whole context of frames, because a policy sees them.
        if self.model.config.window is not None and self.cached:
            self._drop_all_but(max(self.model.config.context, self.states_read))
        return states

    def drop_last(self) -> None:
        """Drop the newest frame and its action, to append it again with another action."""
        assert self.frames is not None
        self.frames = self.frames[:, :-1]
        self.actions = None if self.actions is None else self.actions[:, :-1]
        if self.cached_frames > self.frames.shape[1]:
            self.cached_frames -= 1
            for cache in self.caches:
                cache.rewind(cache.length - 1)
            self.states = {name: x[:, :-1] for name, x in self.states.items()}

    def _make_room(self, more: int) -> None:
        """Drop old frames until those left plus `more` fit into one pass of the trunk."""
        assert self.frames is not None
        if self.model.config.window is not None:
            if not self.cached:
                self._drop_all_but(self.frames_read)
        elif self.frames.shape[1] + more > self.model.config.context:
            self._drop_all_but(self.keep)
            self._reset_caches()
        if not self.cached:
            self._reset_caches()

    def _drop_all_but(self, count: int) -> None:
        """Drop all frames but the last `count`."""
        assert self.frames is not None
        self.cached_frames -= max(0, self.frames.shape[1] - count)
        self.frames = self.frames[:, -count:]
        self.actions = None if self.actions is None else self.actions[:, -count:]

    def _reset_caches(self) -> None:
        self.cached_frames, self.states = 0, {}
        for cache in self.caches:
            cache.rewind(0)

    def _extended(
        self, frames: Tensor, taken: Tensor | None, first: int, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The states that the heads read after the trunk has read `frames`, the first of which is number `first`."""
        part = None if taken is None else taken[:, first : first + frames.shape[1]]
        inputs = self.model.embedded(frames, part, mask)
        hidden, near_hidden = self.model.trunk(inputs, caches=self.caches)
        states = {"inputs": inputs, "hidden": hidden}
        if near_hidden is not None:
            states["near_hidden"] = near_hidden
        if self.states and self.states_read > 1:
            states = {name: torch.cat([self.states[name], x], dim=1) for name, x in states.items()}
        return {name: x[:, -self.states_read :] for name, x in states.items()}


def check_near_horizon(model: WorldModel) -> None:
    horizons, first = model.config.heads.horizons, 0 if model.config.masked else 1
    if (horizons.offsets[0], horizons.factors[0]) != (first, 1):
        raise ValueError(f"a rollout needs a near horizon of offset {first} and factor 1, got {horizons}")


def check_actions(model: WorldModel, video: Tensor, actions: Tensor | None, steps: int) -> None:
    """Raise unless video and actions fit the model and the actions lead `steps` frames past the video."""
    model.check_inputs(video, actions)
    if model.action is None:
        return
    needed, given = video.shape[1] - 1 + steps, 0 if actions is None else actions.shape[1]
    if given < needed:
        raise ValueError(f"actions must cover frames 0..{needed - 1}, got {given} of them")
    if actions is not None and model.config.actions:
        check_ids("actions", actions, model.config.actions)


def as_frames(model: WorldModel, video: Tensor) -> Tensor:
    """Pixels as fp32 in [-1, 1]; tokens unchanged."""
    return video if model.tokens else video_pyramid(video, (1,), dtype=torch.float32)[0]


def with_drift(rollout: Rollout) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each frame [B, 1, ...] with its drift [B, K]: the error, against that frame, of what horizon i predicted
    for it k_i frames earlier."""
    model, horizons = rollout.model, rollout.model.config.heads.horizons
    # By frame number and horizon: predictions of frames that are still to come.
    pending: dict[int, dict[int, Tensor]] = {}
    given = 0 if rollout.actions is None else rollout.actions.shape[1]
    for frame in rollout:
        last = rollout.count - 1
        for i, (offset, prediction) in enumerate(zip(horizons.offsets, rollout.all_horizons(), strict=True)):
            if offset > 0 and (model.window_action is None or last + offset <= given):
                pending.setdefault(last + offset, {})[i] = prediction
        drift = torch.full((len(frame), len(horizons)), torch.nan, device=frame.device)
        for i, prediction in pending.pop(last + 1, {}).items():
            drift[:, i] = disagreement(model, prediction, frame, horizons.factors[i])
        yield frame, drift


def disagreement(model: WorldModel, prediction: Tensor, frame: Tensor, factor: int) -> Tensor:
    """[B]: distance between a horizon's earlier prediction and the full-size frame [B, 1, ...] generated later.

    The mean squared difference at 1/factor; for tokens the mean cross-entropy, in nats, of the ids under the logits
    of the cells that cover them.
    """
    if not model.tokens:
        (small,) = video_pyramid(frame, (factor,))
        return (small - prediction).square().flatten(1).mean(1)
    rows = prediction.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return -rows.log_softmax(-1).gather(-1, frame[..., None].long()).flatten(1).mean(1)


def in_jumps(
    model: WorldModel, frames: Tensor, actions: Tensor | None, jumps: int, horizon: int, draws: dict[str, Any]
) -> Iterator[Tensor]:
    """The frames of rollout_in_jumps, [B, 1, C, height / f, width / f] each. draws: of MultiFrameHeads.predict."""
    horizons, context = model.config.heads.horizons, model.config.context
    stride = horizons.offsets[horizon]
    seen = frames.shape[1]
    for _ in range(jumps):
        start = max(0, frames.shape[1] - context)
        window = None if actions is None else actions[:, seen - (frames.shape[1] - start) : seen - 1 + stride]
        predicted = [x[:, -1:] for x in model.predict(frames[:, start:], window, **draws)]
        # By frames ahead: the frames predicted, at full size.
        full = {0: frames[:, -1]}
        for i in range(horizon + 1):
            full.setdefault(horizons.offsets[i], enlarged(predicted[i][:, 0], horizons.factors[i]))
        filled = []
        for ahead in range(1, stride + 1):
            before, after = max(k for k in full if k <= ahead), min(k for k in full if k >= ahead)
            share = (ahead - before) / max(1, after - before)
            filled.append(torch.lerp(full[before], full[after], share))
        frames = torch.cat([frames, torch.stack(filled, dim=1)], dim=1)[:, -context:]
        seen += stride
        yield predicted[horizon]
