"""context_noise, rollout_loss, weight_schedule and far_gradient: what each changes in a training step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.evaluation import evaluate
from mfwm.models.world_model import WorldModel
from mfwm.training import TrainingConfig, load_model, train
from mfwm.training.world_model import WorldModelLoss, far_factors, fed_back, objective_of
from small_run import moving_squares, small_config
from torch import Tensor

from mfwm_kernels import Horizons, video_pyramid

CASCADE = HeadsConfig(Horizons.cascade(3), patch_sizes=(4, 4, 2), blocks=(0, 1, 1))
NEXT_FRAME = HeadsConfig(Horizons.next_frame())
TOKENS = HeadsConfig(Horizons.cascade(2), output="tokens", vocabulary=7)


def config_of(heads: HeadsConfig, **options: object) -> TrainingConfig:
    frame, patch = ((1, 4, 4), 1) if heads.output == "tokens" else ((3, 16, 16), 4)
    model = WorldModelConfig(frame, patch, 32, 2, 16, context=6, actions=4, heads=heads)
    return TrainingConfig(data="", clip=10, dtype="float32", model=model, **options)  # type: ignore[arg-type]


def objective(config: TrainingConfig) -> WorldModelLoss:
    """An objective whose heads predict something: they start at zero, and then the trunk has no gradient."""
    torch.manual_seed(0)
    made = objective_of(config)
    for i, head in enumerate(made.model.heads.heads):
        torch.manual_seed(i)
        torch.nn.init.normal_(head.weight, std=0.1)  # type: ignore[arg-type]
    if made.model.noise is not None:
        torch.nn.init.normal_(made.model.noise.weight)  # type: ignore[arg-type]
    return made


def clips_of(config: TrainingConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 10, *config.model.frame) if config.model.heads.output == "pixels" else (2, 10, 4, 4)
    high, dtype = (256, torch.uint8) if len(shape) == 5 else (7, torch.int64)
    return {
        "video": torch.randint(high, shape, generator=generator, dtype=dtype),
        "actions": torch.randint(4, shape[:2], generator=generator),
        # The second clip begins with the end of another episode.
        "segment_ids": torch.tensor([[0] * 10, [1] * 3 + [2] * 7]),
    }


def stepped(config: TrainingConfig) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, figures and gradients of one step."""
    made, clips = objective(config), clips_of(config)
    torch.manual_seed(2)
    total, figures = made({**clips, **made.random_inputs(clips)})
    total.backward()
    return total.item(), figures, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("consistency", (None, (0.0, 0.3, 0.3)))
@pytest.mark.parametrize("tap", (None, 1))
def test_the_placebo_gives_the_trunk_the_gradient_of_the_next_frame(
    tap: int | None, consistency: tuple[float, ...] | None
) -> None:
    """Bit for bit; and the far heads learn what they would."""
    far_heads = replace(CASCADE, tap=tap, consistency=consistency)
    _, _, alone = stepped(config_of(NEXT_FRAME))
    _, _, placebo = stepped(config_of(far_heads, far_gradient=False))
    _, _, joint = stepped(config_of(far_heads))
    # The table of window_action is the far horizons' own.
    trunk = [name for name in alone if ".heads." not in name and "window_action" not in name]
    assert len(trunk) > 20
    for name in trunk:
        assert torch.equal(placebo[name], alone[name]), name
    # The far horizons would have changed it, and their heads get the same gradient either way.
    assert any(not torch.equal(joint[name], alone[name]) for name in trunk)
    far = [name for name in joint if ".heads.heads.2." in name or ".heads.blocks.2." in name]
    assert far
    for name in far:
        if consistency is None:
            assert torch.equal(placebo[name], joint[name]), name
        # The near prediction, which they are compared with, is computed apart and so rounded otherwise.
        torch.testing.assert_close(placebo[name], joint[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    (
        {"attend": "inputs"},
        {"conditioning": "frames"},
        {"weighting": "gradients"},
        {"surgery": True},
        {"consistency": (0.0, 0.3, 0.3), "detach": None},
        {"consistency": (0.0, 0.3, 0.3), "detach": "far"},
    ),
)
def test_the_placebo_is_refused_where_horizons_reach_the_trunk_otherwise(options: dict[str, object]) -> None:
    heads = replace(CASCADE, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="far_gradient must be True"):
        config_of(heads, far_gradient=False)
    model, clips = objective(config_of(heads)).model, clips_of(config_of(heads))
    with pytest.raises(ValueError, match="far_gradient must be True"):
        model(clips["video"], clips["actions"], clips["segment_ids"], far_gradient=False)


@pytest.mark.parametrize("heads", (CASCADE, TOKENS, replace(CASCADE, tap=1)), ids=("pixels", "tokens", "tap"))
def test_a_rollout_loss_of_one_is_the_loss(heads: HeadsConfig) -> None:
    total, figures, gradients = stepped(config_of(heads))
    config = config_of(heads)
    made, clips = objective(config), clips_of(config)
    (loss,) = made._losses_of_rollout(clips, None)
    assert loss.total.item() == total
    assert torch.equal(loss.per_horizon, figures["per_horizon"])
    loss.total.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize(
    "heads", (CASCADE, TOKENS, replace(CASCADE, residual=False)), ids=("pixels", "tokens", "plain")
)
def test_a_rollout_loss_sees_the_frames_that_the_model_predicted(heads: HeadsConfig) -> None:
    """Against a written-out second pass, whose targets are the true frames."""
    config = config_of(heads, rollout_loss=2)
    made, clips = objective(config), clips_of(config)
    video, actions, segments = (clips[name] for name in ("video", "actions", "segment_ids"))
    total, figures = made(clips)
    first = made.model(video, actions, segments)
    near = made.model.predict(video, actions, segments)[0]
    frames = video.clone() if heads.output == "tokens" else video_pyramid(video, (1,), dtype=torch.float32)[0]
    for b in range(2):
        for n in range(6):
            if segments[b, n] == segments[b, n + 1]:
                frames[b, n + 1] = near[b, n].argmax(-1) if heads.output == "tokens" else near[b, n]
    second = []
    predictions = made.model.predict(frames, actions, segments)
    if heads.output == "pixels":
        # The frames predicted from the model's own, against the true ones.
        pyramid = video_pyramid(video, heads.horizons.factors, dtype=torch.float32)
        outputs = made.model.heads.distributions(video=frames, **made.model.states(frames, actions, segments))
        for i, offset in enumerate(heads.horizons.offsets):
            valid = heads.horizons.valid(i, 6, 10, segments)
            truth = pyramid[i][:, offset : offset + 6]
            error = (outputs[i].mean[:, : truth.shape[1]] - truth).square().mean((2, 3, 4))
            second.append((error * valid[:, : truth.shape[1]]).sum() / valid.sum())
        expected = sum(w * e for w, e in zip(heads.horizon_weights, second, strict=True))
        torch.testing.assert_close(total, (first.total + expected) / 2, rtol=1e-5, atol=1e-6)
    else:
        log_p = predictions[0].log_softmax(-1)[:, :, :, :, :].gather(-1, video[:, 1:7, ..., None])[..., 0]
        valid = heads.horizons.valid(0, 6, 10, segments)
        near_loss = -(log_p.mean((2, 3)) * valid).sum() / valid.sum()
        again = made.model.heads.loss(
            made.model.heads.outputs(video=frames, **made.model.states(frames, actions, segments)),
            video,
            segment_ids=segments,
        )
        torch.testing.assert_close(again.per_horizon[0], near_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, (first.total + again.total) / 2, rtol=1e-6, atol=1e-6)
    assert torch.equal(figures["per_horizon"], first.per_horizon.detach())


def test_no_gradient_passes_through_frames_fed_back() -> None:
    """The gradient of the near head in the second pass alone is that of a loss on fixed frames."""
    config = config_of(CASCADE, rollout_loss=2)
    made, clips = objective(config), clips_of(config)
    _, second = made._losses_of_rollout(clips, None)
    second.total.backward()
    got = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    with torch.no_grad():
        near = made.model.predict(clips["video"], clips["actions"], clips["segment_ids"])[0]
        frames = fed_back(near, clips["video"], clips["segment_ids"])
    made.model(clips["video"], clips["actions"], clips["segment_ids"], seen=frames).total.backward()
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_context_noise_changes_what_is_seen_and_not_the_targets() -> None:
    config = config_of(CASCADE, context_noise=0.4)
    assert config.model.noise_condition
    made, clips = objective(config), clips_of(config)
    torch.manual_seed(3)
    random = made.random_inputs(clips)
    assert random["noise"].shape == (2,) and 0 <= random["noise"].min() and random["noise"].max() <= 0.4
    (pixels,) = video_pyramid(clips["video"], (1,), dtype=torch.float32)
    seen = pixels + random["noise"].view(2, 1, 1, 1, 1) * random["noise_on_frames"]
    states = made.model.states(seen, clips["actions"], clips["segment_ids"], noise=random["noise"])
    predicted = made.model.heads.distributions(video=seen, **states)
    valid = CASCADE.horizons.valid(0, 6, 10, clips["segment_ids"])
    error = (predicted[0].mean - pixels[:, 1:7]).square().mean((2, 3, 4))
    _, figures = made({**clips, **random})
    torch.testing.assert_close(figures["per_horizon"][0], (error * valid).sum() / valid.sum(), rtol=1e-5, atol=1e-6)


def test_the_model_is_told_the_strength_of_the_noise() -> None:
    """The same frames with another strength give another state; a strength of 0 is no condition at all."""
    config = config_of(CASCADE, context_noise=0.4)
    made, clips = objective(config), clips_of(config)
    hidden = [
        made.model.states(clips["video"], clips["actions"], noise=noise)["hidden"]
        for noise in (None, torch.zeros(2), torch.tensor([0.0, 0.3]))
    ]
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0][0], hidden[2][0]) and not torch.allclose(hidden[0][1], hidden[2][1], atol=1e-3)


def test_noise_is_sampled_once_for_all_parts_of_a_step(tmp_path: Path) -> None:
    """So that a step in two parts computes what a step in one does."""
    moving_squares(tmp_path / "data")
    base = replace(
        small_config(tmp_path / "data"), steps=3, context_noise=0.3, rollout_loss=2, weight_schedule="anneal"
    )
    whole = train(base, tmp_path / "whole", progress=False)
    parts = train(replace(base, accumulate=2), tmp_path / "parts", progress=False)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_evaluation_adds_no_noise(tmp_path: Path) -> None:
    """Twice the same figures, which are those of the same weights in a model without the condition."""
    moving_squares(tmp_path / "data")
    config = replace(small_config(tmp_path / "data"), steps=4, context_noise=0.3)
    train(config, tmp_path / "run", progress=False)
    model, read, _ = load_model(tmp_path / "run")
    assert read == config and model.noise is not None
    plain = WorldModel(replace(read.model, noise_condition=False)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("noise.")})
    video = torch.randint(256, (1, 8, 3, 16, 16), dtype=torch.uint8)
    actions = torch.zeros(1, 8, dtype=torch.int64)
    for a, b in zip(model.predict(video, actions), plain.predict(video, actions), strict=True):
        assert torch.equal(a, b)
    first, again = (evaluate(tmp_path / "run", clips=4, batch=4, progress=False) for _ in range(2))
    assert first["psnr"] == again["psnr"] and first["rollout_psnr"] == again["rollout_psnr"]


def test_schedules_scale_the_far_weights_only() -> None:
    total, figures, _ = stepped(config_of(replace(CASCADE, weights=(1.0, 1.0, 1.0))))
    config = config_of(replace(CASCADE, weights=(1.0, 1.0, 1.0)), weight_schedule="anneal", steps=10)
    for step, factor in ((0, 1.0), (5, 0.5), (9, 0.1)):
        made = objective(config)
        made.begin_step(step)
        scaled, same = made(clips_of(config))
        near, *far = figures["per_horizon"].tolist()
        assert scaled.item() == pytest.approx(near + factor * sum(far), rel=1e-5)
        assert torch.equal(same["per_horizon"], figures["per_horizon"])
    assert total == pytest.approx(sum(figures["per_horizon"].tolist()), rel=1e-5)


def test_a_schedule_scales_consistency_by_its_far_horizon() -> None:
    heads = replace(CASCADE, weights=(0.0, 0.0, 0.0), consistency=(0.0, 0.3, 0.7))
    _, figures, _ = stepped(config_of(heads))
    made = objective(config_of(heads, weight_schedule="grow", steps=8))
    made.begin_step(1)  # Horizon 1 at a half, horizon 2 not yet.
    total, _ = made(clips_of(config_of(heads)))
    assert total.item() == pytest.approx(0.5 * 0.3 * figures["consistency"][1].item(), rel=1e-5)


def test_a_horizon_without_targets_costs_no_uncertainty() -> None:
    """Its s_i would fall for ever: nothing but its cost depends on it."""
    clips = clips_of(config_of(CASCADE))
    clips = {name: values[:, :4] for name, values in clips.items()}
    for options in ({}, {"weight_schedule": "anneal", "steps": 10}):
        made = objective(config_of(replace(CASCADE, weighting="uncertainty"), **options))
        total, _ = made(clips)
        total.backward()
        gradient = made.model.heads.uncertainty.log_variance.grad  # type: ignore[union-attr]
        assert gradient[2] == 0 and gradient[0] != 0 and gradient[1] != 0  # type: ignore[index]


@pytest.mark.slow
def test_a_schedule_is_compiled_once() -> None:
    """And gives in each step what it gives uncompiled."""
    heads = replace(CASCADE, blocks=None)
    config = config_of(heads, weight_schedule="anneal", steps=10)
    plain, compiled = objective(config), objective(config)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled.compile(backend=counter)
    for step in range(4):
        losses = []
        for made in (plain, compiled):
            made.begin_step(step)
            losses.append(made(clips_of(config))[0])
        assert torch.equal(*losses)
    assert counter.frame_count == 1


def test_factors_of_the_schedules() -> None:
    offsets = (1, 2, 4, 8)
    assert far_factors("constant", offsets, 0.3) == [1, 1, 1, 1]
    assert far_factors("anneal", offsets, 0.75) == [1, 0.25, 0.25, 0.25]
    assert far_factors("anneal", offsets, 1.0) == [1, 0, 0, 0]
    assert far_factors("grow", offsets, 0.0) == [1, 0, 0, 0]
    assert far_factors("grow", offsets, 0.25) == [1, 1, 0.5, 0]
    assert far_factors("grow", offsets, 0.5) == [1, 1, 1, 1] == far_factors("grow", offsets, 0.9)
    # Horizons of one offset are one step of the schedule; all of the nearest offset stay.
    assert far_factors("anneal", (1, 1, 2), 0.5) == [1, 1, 0.5]
    assert far_factors("grow", (0, 1), 0.25) == [1, 0.5] and far_factors("grow", (1,), 0.1) == [1]


def test_far_weights_decay_by_default() -> None:
    assert HeadsConfig().horizon_weights == (1.0, 0.5, 0.2, 0.1)
    assert HeadsConfig(Horizons.multi_resolution()).horizon_weights == (1.0, 1.0, 1.0, 0.5, 0.2)
    assert HeadsConfig(weights=(1.0, 1.0, 1.0, 1.0)).horizon_weights == (1.0, 1.0, 1.0, 1.0)
    total, figures, _ = stepped(config_of(CASCADE))
    per_horizon = figures["per_horizon"].tolist()
    assert total == pytest.approx(sum(w * e for w, e in zip((1, 0.5, 0.2), per_horizon, strict=True)), rel=1e-5)


@pytest.mark.parametrize(
    "heads, options, rule",
    (
        (CASCADE, {"context_noise": -0.1}, "context_noise must be"),
        (CASCADE, {"rollout_loss": 0}, "rollout_loss must be"),
        (HeadsConfig(Horizons((2,), (1,))), {"rollout_loss": 2}, "rollout_loss above 1 feeds back"),
        (replace(CASCADE, surgery=True), {"rollout_loss": 2}, "rollout_loss must be 1"),
        (CASCADE, {"weight_schedule": "shrink"}, "weight_schedule must be"),
        (TOKENS, {"context_noise": 0.1}, "context_noise must be 0 for tokens"),
        (CASCADE, {"far_gradient": "no"}, "far_gradient must be"),
        (replace(CASCADE, weighting="gradients"), {"weight_schedule": "anneal"}, 'must be "constant" with weighting'),
    ),
)
def test_malformed_options_are_named(heads: HeadsConfig, options: dict[str, object], rule: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rule):
        config_of(heads, **options)


def test_a_run_from_before_these_options_is_read_and_resumed(tmp_path: Path) -> None:
    """Its weights were ones where it gave none, and it ends as it would have."""
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    heads = replace(small.model.heads, weights=(1.0, 1.0, 1.0))
    config = replace(small, steps=6, model=replace(small.model, heads=heads))
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=3)
    path = tmp_path / "run" / "config.json"
    tree = json.loads(path.read_text())
    for name in ("context_noise", "rollout_loss", "weight_schedule", "far_gradient"):
        del tree[name]
    del tree["model"]["noise_condition"]
    tree["model"]["heads"]["weights"] = None
    path.write_text(json.dumps(tree))

    assert load_model(tmp_path / "run")[1] == config
    decayed = replace(heads, weights=None)
    with pytest.raises(ValueError, match=r"model.heads.weights is None, but .* was started with \[1.0, 1.0, 1.0\]"):
        train(replace(config, model=replace(small.model, heads=decayed)), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"rollout_loss is 2, but .* was started with 1"):
        train(replace(config, rollout_loss=2), tmp_path / "run", progress=False)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
