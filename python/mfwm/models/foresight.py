"""Foresight: a rollout one action at a time, which shows what every horizon expects before the action is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rollouts import Rollout
from .world_model import WorldModel


class Foresight(Rollout):
    """A rollout whose next action is chosen after its consequences have been predicted.

    `expect` reads the newest frame with an action, and `advance` takes one. If both are the same action, the trunk
    reads the frame once; if not, the frame is dropped from the caches and read again.

    Args:
        video: the frames to start from, [B, T0, ...].
        actions: [B, T0 - 1], those between them; None for a model without actions.
        options: temperature, top_k, masked_steps, generator and keep of Rollout.
    """

    def __init__(self, model: WorldModel, video: Tensor, actions: Tensor | None, **options: Any) -> None:
        # The steps are not counted here, and every action is given to advance(), so the policy is never called.
        super().__init__(model, video, actions, 1, policy=no_policy, **options)
        config = model.config.heads
        # With these targets, far horizons do not forecast what frames show from what has been seen.
        self.near_only = config.conditioning == "frames" or config.token_targets == "tokenised"
        # Whether the trunk has read the newest frame, with which action, and the horizons' outputs then.
        self._is_read = False
        self._action_read: Tensor | None = None
        self._seen: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def expect(self, plan: Tensor | None) -> tuple[Tensor, ...]:
        """What every horizon (or only the near one, with `near_only`) predicts, seen from the newest frame.

        plan: [B, P] or [B, P, A], the actions that would be taken from the newest frame on, P at least the longest
        offset; None for a model without actions.
        """
        states = self._states(None if plan is None else plan[:, :1])
        window = None
        if self.model.window_action is not None:
            assert self.memory.actions is not None and plan is not None
            taken = self.memory.actions[:, -states["hidden"].shape[1] :]
            window = self.model.window_action(torch.cat([taken, plan[:, 1:]], dim=1))
        self._seen = self._outputs(states, window, near_only=self.near_only)
        return self.model.heads.frames(self._seen, self._last())

    @torch.no_grad()
    def advance(self, action: Tensor | None) -> Tensor:
        """The next frame [B, 1, ...] after `action` [B, 1] or [B, 1, A]."""
        states = self._states(action)
        if self.model.config.masked:
            self.last = self._masked_frame()
        else:
            self.last = self._drawn(self.near(states) if self._seen is None else self._seen[:1])
        self._seen, self._is_read = None, False
        return self.last

    def _states(self, action: Tensor | None) -> dict[str, Tensor]:
        """What the heads read once the trunk has read the newest frame with this action."""
        before = self._action_read
        if self._is_read and action is not None and before is not None and not action.equal(before):
            self.memory.drop_last()
            self.count -= 1
            self._is_read, self._seen = False, None
        if not self._is_read:
            self.memory.append(self.last, action)
            self.count += 1
            self._is_read, self._action_read = True, action
        return self.memory.read()


def no_policy(frames: Tensor) -> Tensor:
    raise AssertionError("every action is given to advance()")
