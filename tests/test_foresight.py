"""Foresight: a frame at a time with a look ahead, equal to a rollout whose actions are known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mfwm import WorldModel
from mfwm.models.foresight import Foresight
from mfwm.models.rollouts import Rollout
from small_model import HORIZONS, build, clip

from mfwm_kernels import Horizons

STEPS = 9  # past the context of 6 frames, where a model without a window restarts
LONGEST = HORIZONS.offsets[-1]

TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"blocks": (0, 1, 1)},
    "window": {"trunk": {"positions": "rope", "window": 3}, "blocks": (0, 1, 1)},
    "tap": {"tap": 1},
    "continuous": {"trunk": {"actions": 0, "action_size": 3}},
    "no actions": {"conditioning": "none"},
    "frames": {"conditioning": "frames"},
    "tokens": TOKENS,
    "masked": {**TOKENS, "horizons": Horizons((0, 1, 3), (1, 2, 4)), "trunk": {"masked": True}},
    "drawn": {"kind": "gaussian"},
}


def actions_for(model: WorldModel, count: int) -> torch.Tensor | None:
    if model.action is None:
        return None
    size = model.config.action_size
    return torch.randn(2, count, size) if size else torch.randint(0, model.config.actions, (2, count))


@pytest.mark.parametrize("name", CASES)
def test_looking_ahead_changes_no_frame(name: str) -> None:
    model = build(**CASES[name]).eval()
    video = clip(4, model)["video"]
    actions = actions_for(model, 3 + STEPS + LONGEST)
    drawn = {"temperature": 0.7 if model.tokens or name == "drawn" else 0.0}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    want = Rollout(model, video, actions, STEPS, generator=generator(), **drawn)
    seen = None if actions is None else actions[:, :3]
    walk = Foresight(model, video, seen, generator=generator(), **drawn)
    for step in range(STEPS):
        plan = None if actions is None else actions[:, 3 + step :]
        # What other actions would lead to, and then what is done.
        looks = [None if plan is None else plan.flip(1), plan] if step % 2 else [plan]
        for look in looks:
            predicted = walk.expect(look)
        frame = want.step()
        # Every third action comes as a surprise.
        if step % 3 == 2 and plan is not None:
            walk.expect(plan.flip(1))
        assert torch.allclose(walk.advance(None if plan is None else plan[:, :1]), frame, atol=1e-5), step
        # A masked model restarts a frame earlier for a step than for a look, which needs no room for the next frame.
        restarted = name == "masked" and 4 + step >= model.config.context
        if not walk.near_only and not restarted:
            for got, expected in zip(predicted, want.all_horizons(), strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert walk.near_only == (name == "frames")


def test_another_action_leads_elsewhere() -> None:
    model = build().eval()
    given = clip(4, model)

    def after(action: int) -> torch.Tensor:
        walk = Foresight(model, given["video"], given["actions"][:, :3])
        walk.expect(torch.zeros(2, LONGEST, dtype=torch.int64))
        return walk.advance(torch.full((2, 1), action))

    assert torch.equal(after(0), after(0)) and not torch.allclose(after(0), after(1))
