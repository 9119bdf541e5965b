"""The model: causality, every option alive, the zero start, rollouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig

from mfwm_kernels import GradMonitor, Horizons, video_pyramid

HORIZONS = Horizons((1, 2, 4), (1, 2, 4))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2)},
    "tap": {"tap": 1, "blocks": (0, 0, 1)},
    "gated": {"lag_gate": True},
    "no norm, equal start": {"norm": False, "residual": False},
    "consistency": {"consistency": (0.0, 0.3, 0.3), "detach": None, "weights": (1.0, 0.5, 0.25)},
    "no actions": {"conditioning": "none"},
}


def build(**options: Any) -> WorldModel:
    heads = HeadsConfig(horizons=HORIZONS, **options)
    actions = 0 if options.get("conditioning") == "none" else 5
    config = WorldModelConfig((3, 16, 16), 4, 32, 2, 16, context=6, actions=actions, heads=heads)
    model = WorldModel(config)
    # Heads that start at zero predict nothing that could leak.
    for head in model.heads.heads:
        torch.nn.init.normal_(head.weight, std=0.1)  # type: ignore[arg-type]
    return model


def clip(frames: int = 6) -> dict[str, torch.Tensor]:
    return {
        "video": torch.randint(0, 256, (2, frames, 3, 16, 16), dtype=torch.uint8),
        "actions": torch.randint(0, 5, (2, frames)),
    }


def inputs(model: WorldModel, clips: dict[str, torch.Tensor]) -> dict[str, Any]:
    return clips if model.action is not None else {**clips, "actions": None}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_causality(options: dict[str, Any]) -> None:
    model, clips = build(**options).eval(), clip()
    before = model.predict(**inputs(model, clips))
    changed_at = 3
    other_video = clips["video"].clone()
    other_video[:, changed_at] = 255 - other_video[:, changed_at]
    after = model.predict(**inputs(model, {**clips, "video": other_video}))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :changed_at], new[:, :changed_at])
        assert not torch.equal(old[:, changed_at], new[:, changed_at])
    if model.action is None:
        return
    other_actions = clips["actions"].clone()
    other_actions[:, changed_at] = (other_actions[:, changed_at] + 1) % 5
    after = model.predict(**{**clips, "actions": other_actions})
    for offset, old, new in zip(HORIZONS.offsets, before, after, strict=True):
        for n in range(6):
            sees = n >= changed_at or n + offset > changed_at
            assert torch.equal(old[:, n], new[:, n]) != sees, f"offset {offset}, position {n}"


def test_segments_do_not_mix() -> None:
    """Nothing before an episode's first frame reaches its predictions, nor does an action after its last."""
    model, clips = build(blocks=(0, 1, 1), patch_sizes=(4, 4, 2)).eval(), clip()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    before = model.predict(**clips, segment_ids=segments)
    video, actions = clips["video"].clone(), clips["actions"].clone()
    video[:, :3] = 255 - video[:, :3]
    actions[:, :3] = (actions[:, :3] + 1) % 5
    after = model.predict(video, actions, segments)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, 3:], new[:, 3:])
    actions = clips["actions"].clone()
    actions[:, 3:] = (actions[:, 3:] + 1) % 5
    after = model.predict(clips["video"], actions, segments)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :3], new[:, :3])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = build(**options)
    clips = clip(10)
    loss = model(**inputs(model, clips), segment_ids=torch.zeros(2, 10, dtype=torch.int64))
    assert loss.per_horizon.isfinite().all() and (loss.counts > 0).all()
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_options_tell_apart() -> None:
    """Each option changes the predictions of a model with the same seed, or its loss."""
    clips = clip(10)
    losses = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(3)
        model = build(**options)
        losses[name] = model(**inputs(model, clips)).total.item()
    losses.pop("gated")  # gates start at 1: a plain sum
    assert len(set(losses.values())) == len(losses), losses


def test_untrained_model_keeps_the_last_frame() -> None:
    config = WorldModelConfig((3, 16, 16), 4, 32, 1, 16, context=6, actions=5, heads=HeadsConfig(horizons=HORIZONS))
    clips = clip()
    model = WorldModel(config)
    kept = video_pyramid(clips["video"], HORIZONS.factors)
    for prediction, frame in zip(model.predict(**clips), kept, strict=True):
        torch.testing.assert_close(prediction, frame)
    rolled = model.rollout(clips["video"][:, :3], clips["actions"], 4)
    torch.testing.assert_close(rolled, kept[0][:, 2:3].expand(-1, 4, -1, -1, -1))


def test_rollout_feeds_back_its_own_frames() -> None:
    model, clips = build().eval(), clip(12)
    rolled = model.rollout(clips["video"][:, :4], clips["actions"], 8)
    (frames,) = video_pyramid(clips["video"][:, :4], (1,))
    for step in range(8):
        start = max(0, frames.shape[1] - model.config.context)
        following = model.predict(frames[:, start:], clips["actions"][:, start : frames.shape[1]])[0][:, -1:]
        torch.testing.assert_close(rolled[:, step : step + 1], following)
        frames = torch.cat([frames, following], dim=1)
    with pytest.raises(ValueError, match=r"actions must cover frames 0\.\.10, got 5"):
        model.rollout(clips["video"][:, :4], clips["actions"][:, :5], 8)


def test_continuous_actions_and_the_monitor() -> None:
    heads = HeadsConfig(horizons=HORIZONS)
    model = WorldModel(WorldModelConfig((3, 16, 16), 4, 32, 1, 16, context=6, actions=0, action_size=2, heads=heads))
    for head in model.heads.heads:
        torch.nn.init.normal_(head.weight, std=0.1)  # type: ignore[arg-type]
    monitor = GradMonitor(3)
    model(clip()["video"], torch.randn(2, 6, 2), grad_monitor=monitor).total.backward()
    assert (monitor.norms > 0).all() and monitor.cosines.diagonal().allclose(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": HeadsConfig(tap=4)}, r"heads.tap must be in 1\.\.3"),
        ({"patch": 7}, "patch = 7 does not divide the frame 64 x 64"),
        ({"width": 100}, "head_width must divide width = 100"),
        ({"actions": 0}, r'heads\.conditioning must be "none"'),
    ],
)
def test_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**options)
