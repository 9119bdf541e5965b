"""Latents of far frames: what the posterior and the prior see, the divergence, draws, and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads, WorldModelConfig
from mfwm.evaluation.latents import latent_measures, latent_summary
from mfwm.models.latents import kl_divergence
from mfwm.models.rollouts import rollout, rollout_in_jumps, rollout_with_drift
from mfwm.training import TrainingConfig, train
from mfwm.training.run_log import read_log
from mfwm.training.world_model import WorldModelLoss
from small_model import HORIZONS, build, clip
from small_run import moving_squares, small_config
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence_of_torch

from mfwm_kernels import Horizons, video_pyramid

# The second clip begins with the end of another episode.
SEGMENTS = torch.tensor([[0] * 9, [1] * 3 + [2] * 6])


def latent_model(**options: Any) -> Any:
    """A model whose far predictions follow z."""
    torch.manual_seed(0)
    model = build(latent=3, **options)
    for embed in model.heads.latents.embed:  # type: ignore[union-attr]
        torch.nn.init.normal_(embed.weight)
    return model


def test_the_divergence_is_that_of_torch() -> None:
    mean, s, other, t = torch.randn(4, 50)
    expected = divergence_of_torch(Normal(mean, torch.exp(s / 2)), Normal(other, torch.exp(t / 2)))
    torch.testing.assert_close(kl_divergence(mean, s, other, t), expected)


def test_inferred_latents_are_those_of_the_formula() -> None:
    latents, hidden, video = latent_model().heads.latents, torch.randn(2, 6, 4, 4, 32), clip(9)["video"]
    noise, counts = torch.randn(2, 6, 2, 3), torch.stack([HORIZONS.valid(i, 6, 9) for i in range(3)], dim=-1)
    added, kl = latents.inferred(hidden, video, counts.expand(2, -1, -1), noise)
    state, pyramid = hidden.mean((2, 3)), video_pyramid(video, HORIZONS.factors, dtype=torch.float32)
    for far, i in enumerate((1, 2)):
        for n in range(min(6, 9 - HORIZONS.offsets[i])):
            picture = F.adaptive_avg_pool2d(pyramid[i][:, n + HORIZONS.offsets[i]], 8).flatten(1)
            mean, s = latents.posteriors[far](torch.cat([state[:, n], picture], dim=1)).chunk(2, dim=1)
            prior_mean, prior_s = latents.prior(state[:, n]).view(2, 2, 2, 3)[:, far].unbind(1)
            inferred, told = Normal(mean, torch.exp(s / 2)), Normal(prior_mean, torch.exp(prior_s / 2))
            torch.testing.assert_close(kl[:, n, i], divergence_of_torch(inferred, told).sum(1))
            z = mean + torch.exp(s / 2) * noise[:, n, far]
            torch.testing.assert_close(added[:, n, i], latents.embed[far](z))


def test_a_posterior_sees_the_frame_it_is_for_alone() -> None:
    """And the prior none of the frames ahead; where a horizon does not count, its z is that of the prior."""
    model = latent_model().eval()
    heads, hidden = model.heads, torch.randn(2, 6, 4, 4, 32)
    video = clip(9)["video"]
    counts = torch.stack([HORIZONS.valid(i, 6, 9, SEGMENTS) for i in range(3)], dim=-1)
    before, kl = heads.latents.inferred(hidden, video, counts)
    assert (before[..., 0, :] == 0).all() and (kl[..., 0] == 0).all()
    prior = heads.latents.drawn(hidden)
    for i in (1, 2):
        assert torch.equal(kl[..., i] > 0, counts[..., i])
        assert torch.equal((before[:, :, i] != prior[:, :, i]).any(-1), counts[..., i])
    for m in range(9):
        changed = video.clone()
        changed[:, m] = 255 - changed[:, m]
        after, _ = heads.latents.inferred(hidden, changed, counts)
        for i in (1, 2):
            read = counts[..., i] & (torch.arange(6) + HORIZONS.offsets[i] == m)
            assert torch.equal((after[:, :, i] != before[:, :, i]).any(-1), read)


@pytest.mark.parametrize("blocks", (None, (0, 1, 1)))
@pytest.mark.parametrize("weights", (None, "[B, T]", "[B, T, K]"))
def test_the_loss_is_that_of_inferred_latents_and_their_divergence(blocks: Any, weights: str | None) -> None:
    model = latent_model(blocks=blocks, kl=0.3, weights=(1.0, 0.7, 0.3))
    clips, noise = {**clip(9), "segment_ids": SEGMENTS}, torch.randn(2, 6, 2, 3)
    of_positions = None if weights is None else torch.rand(2, 6, *((3,) if "K" in weights else ()))
    if of_positions is not None:
        of_positions[0, 2] = 0
    states, heads = model.states(**clips), model.heads
    loss = heads(video=clips["video"], position_weights=of_positions, latent_noise=noise, **states)
    counts = torch.stack([HORIZONS.valid(i, 6, 9, SEGMENTS) for i in range(3)], dim=-1)
    weighted = counts.float()
    if of_positions is not None:
        weighted = weighted * (of_positions if of_positions.dim() == 3 else of_positions[..., None])
    _, kl = heads.latents.inferred(states["hidden"], clips["video"], counts & (weighted > 0), noise)
    means = (kl * weighted).sum((0, 1)) / (weighted > 0).sum((0, 1))
    torch.testing.assert_close(loss.terms["kl"], means.detach())
    found = heads.branched(
        video=clips["video"], targets=clips["video"], counts=counts & (weighted > 0), latent_noise=noise, **states
    )
    plain = heads.loss(found.outputs, clips["video"], segment_ids=SEGMENTS, position_weights=of_positions)
    assert torch.equal(plain.per_horizon, loss.per_horizon)
    expected = plain.total + 0.3 * (torch.tensor([1.0, 0.7, 0.3]) * means).sum()
    torch.testing.assert_close(loss.total, expected)
    other = heads(video=clips["video"], position_weights=of_positions, latent_noise=-noise, **states)
    assert other.per_horizon[0] == loss.per_horizon[0] and (other.per_horizon[1:] != loss.per_horizon[1:]).all()


def test_noise_is_drawn_in_training_and_not_in_evaluation() -> None:
    model, clips = latent_model(), clip(9)
    assert model(**clips).total != model(**clips).total
    assert model.eval()(**clips).total == model(**clips).total


def test_predictions_draw_from_the_prior() -> None:
    model, clips = latent_model().eval(), clip(9)

    def predicted(temperature: float, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return model.predict(**clips, temperature=temperature, generator=generator)

    still, drawn, again, other = predicted(0.0), predicted(1.0), predicted(1.0), predicted(1.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    for draw in (drawn, other):
        assert [torch.equal(a, b) for a, b in zip(still, draw, strict=True)] == [True, False, False]
    assert not torch.equal(drawn[1], other[1])
    hidden = model.states(**clips)["hidden"]
    many = torch.stack([model.heads.latents.drawn(hidden, 1.0)[:, :, 1:] for _ in range(2000)])
    center = model.heads.latents.drawn(hidden)[:, :, 1:]
    assert ((many.mean(0) - center).abs() < 0.15 * many.std(0)).float().mean() > 0.99


def test_rollouts_draw_in_jumps() -> None:
    model, clips = latent_model().eval(), clip(20)

    def jumps(temperature: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"temperature": temperature, "generator": generator}
        return rollout_in_jumps(model, clips["video"][:, :4], clips["actions"], 3, 2, **options)

    assert torch.equal(jumps(1.0), jumps(1.0)) and not torch.equal(jumps(1.0), jumps(1.0, 1))
    assert torch.equal(jumps(0.0), jumps(0.0, 1)) and not torch.equal(jumps(0.0), jumps(1.0))
    # The near horizon has no z: a closed loop is what it is, and drift is of the prior's means.
    frames, drift = rollout_with_drift(model, clips["video"][:, :4], clips["actions"], 5)
    assert torch.equal(frames, rollout(model, clips["video"][:, :4], clips["actions"], 5))
    assert torch.equal(
        drift.nan_to_num(), rollout_with_drift(model, clips["video"][:, :4], clips["actions"], 5)[1].nan_to_num()
    )
    with pytest.raises(ValueError, match="temperature must be 0 if the near horizon predicts neither"):
        rollout(model, clips["video"][:, :4], clips["actions"], 5, temperature=1.0)


def test_latents_learn_what_cannot_be_known() -> None:
    """A coin decides whether the far frame is black or white: the mean is grey, and samples are not."""
    torch.manual_seed(0)
    config = HeadsConfig(
        Horizons((1, 2), (1, 2)), latent=2, kl=0.01, conditioning="none", residual=False, weights=(1.0, 1.0)
    )
    heads, hidden = MultiFrameHeads(16, 4, config), torch.randn(64, 1, 2, 2, 16)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(150):
        coins = torch.randint(0, 2, (64, 1, 1, 1, 1)).float() * 2 - 1
        video = torch.cat([torch.zeros(64, 2, 3, 8, 8), coins.expand(-1, 1, 3, 8, 8)], dim=1)
        loss = heads(hidden, None, video)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert loss.per_horizon[1] < 0.2 and loss.terms["kl"][1] > 0.3
    drawn = heads.predict(hidden, None, video[:, :1], temperature=1.0)[1].mean((1, 2, 3, 4))
    still = heads.predict(hidden, None, video[:, :1])[1].mean((1, 2, 3, 4))
    assert drawn.std() > 0.5 and (drawn > 0.3).any() and (drawn < -0.3).any()
    assert still.std() < drawn.std()


def test_the_best_of_several_draws_is_measured_frame_by_frame() -> None:
    model, clips = latent_model().eval(), {**clip(9), "segment_ids": torch.zeros(2, 9, dtype=torch.long)}
    pyramid = video_pyramid(clips["video"], HORIZONS.factors, dtype=torch.float32)
    pairs = list(zip(pyramid, HORIZONS.offsets, strict=True))
    truths = [frames[:, k : k + min(6, 9 - k)] for frames, k in pairs]
    found = latent_measures(model, clips, truths, 4, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    still = model.predict(**clips)
    draws = [model.predict(**clips, temperature=1.0, generator=generator) for _ in range(4)]
    for column, i in enumerate((1, 2)):
        end = truths[i].shape[1]
        errors = torch.stack([(draw[i][:, :end] - truths[i]).square().mean((2, 3, 4)) for draw in draws])
        expected = {
            "latent_best": errors.amin(0).mean(1),
            "latent_draws": errors.mean((0, 2)),
            "latent_prediction": (still[i][:, :end] - truths[i]).square().mean((1, 2, 3, 4)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(torch.from_numpy(found[name][:, column]), value, msg=name)
    # The logged divergence is that of the whole batch; here each clip has as many positions that count.
    kl = model(**clips).terms["kl"]
    torch.testing.assert_close(torch.from_numpy(found["latent_kl"]).mean(0), kl[1:])
    metrics: Any = latent_summary(found, ["2", "4"], 4, 0)
    for k in ("2", "4"):
        low, high = metrics["latent_best_gain_95"][k]
        assert low <= metrics["latent_best_psnr"][k] - metrics["latent_prediction_psnr"][k] <= high
        assert metrics["latent_draws_psnr"][k] < metrics["latent_best_psnr"][k]


def objective(**options: Any) -> WorldModelLoss:
    training = {name: options.pop(name) for name in ("weight_schedule", "steps", "kl_warmup") if name in options}
    return WorldModelLoss(latent_model(**options), **training)


def test_parts_of_a_batch_add_up() -> None:
    made = objective(kl=0.1)
    clips = {**clip(9), "segment_ids": SEGMENTS}
    clips |= made.random_inputs(clips)
    total, figures = made(clips)
    parts = [{name: value[b : b + 1] for name, value in clips.items()} for b in range(2)]
    counts = torch.stack([made.counts(part) for part in parts])
    shares = 2 * counts / counts.sum(0).clamp_min(1)
    found = [made(part, share) for part, share in zip(parts, shares, strict=True)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, total)
    assert figures["kl"][0] == 0 and (figures["kl"][1:] > 0).all()
    for name, value in figures.items():
        torch.testing.assert_close((found[0][1][name] + found[1][1][name]) / 2, value, msg=name)


def test_the_weight_of_the_divergence_warms_up() -> None:
    """Linearly, times the factors of the far horizons."""
    for schedule, factors in (("constant", (1.0, 1.0)), ("grow", (0.5, 0.0))):
        made = objective(kl=0.5, weights=(0.0, 1.0, 1.0), weight_schedule=schedule, steps=8, kl_warmup=4)
        clips = {**clip(9), "segment_ids": SEGMENTS}
        clips |= made.random_inputs(clips)
        made.begin_step(1)
        total, figures = made(clips)
        of_far = figures["per_horizon"][1:] + 0.5 * 0.5 * figures["kl"][1:]
        assert total.item() == pytest.approx((torch.tensor(factors) * of_far).sum().item(), rel=1e-5)
    made.begin_step(9)
    assert made.kl_factor == 1


def test_a_run_with_latents_logs_and_resumes(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    model = replace(small.model, heads=replace(small.model.heads, latent=4))
    config = replace(small, steps=6, look_every=6, kl_warmup=4, rollout_loss=2, model=model)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=3)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert all(row["kl"][0] == 0 and min(row["kl"][1:]) > 0 for row in rows) and "kl" in rows[-1]["held_out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent must be >= 1, got 0"),
        ({"latent": 2, "kl": -1.0}, "kl must be >= 0, got -1.0"),
        ({"latent": 2, "conditioning": "frames"}, 'latent must be None with conditioning "frames"'),
        ({"latent": 2, "horizons": Horizons.next_frame()}, "latent needs a horizon of a larger offset than the first"),
        ({"latent": 2, "output": "tokens", "vocabulary": 7}, "latent is of the loss of pixels and latents, .* got 2"),
    ],
)
def test_options_of_latents_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        HeadsConfig(**options)


def test_a_warm_up_needs_latents() -> None:
    with pytest.raises(ValueError, match=r"kl_warmup must be 0 for a model without model\.heads\.latent, got 5"):
        TrainingConfig(data="", model=WorldModelConfig(), kl_warmup=5)


@pytest.mark.slow
def test_latents_compile_whole() -> None:
    made = objective(kl_warmup=4)
    clips = {**clip(9), "segment_ids": SEGMENTS}
    clips |= made.random_inputs(clips)
    found = []
    for run in (made, torch.compile(made, fullgraph=True, backend="eager")):
        made.zero_grad()
        total, figures = run(clips)
        total.backward()
        found.append((total.detach(), figures, [p.grad for p in made.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"latent_noise": torch.zeros(4, 2, 3)},
            r"latent_noise must have 4 dimensions, \[B, T, far horizons, latent\]",
        ),
        (
            {"latent_noise": torch.zeros(2, 3, 2, 3)},
            r"latent_noise must have shape .* = \[2, 4, 2, 3\], got \[2, 3, 2, 3\]",
        ),
        ({"latent_noise": torch.zeros(2, 4, 2, 3).long()}, "latent_noise must have dtype"),
        ({"latent_noise": torch.zeros(2, 4, 2, 3, device="meta")}, "latent_noise must be on the device of hidden, cpu"),
        ({"position_weights": torch.ones(2)}, "position_weights must have 2 or 3 dimensions"),
        ({"video": [1]}, "video must be a torch.Tensor, got list"),
        ({"hidden": [1]}, "hidden must be a torch.Tensor, got list"),
    ],
)
def test_arguments_of_the_loss_are_checked(given: dict[str, Any], message: str) -> None:
    config = HeadsConfig(Horizons((1, 2, 4), (1, 2, 4)), patch_sizes=(4, 4, 2), latent=3)
    clips = {
        "hidden": torch.randn(2, 4, 4, 4, 16),
        "actions": torch.randn(2, 7, 16),
        "video": torch.rand(2, 8, 3, 16, 16),
    }
    heads = MultiFrameHeads(16, 4, config)
    heads(**clips)
    with pytest.raises((ValueError, TypeError), match=message):
        heads(**{**clips, **given})


def test_noise_without_latents_and_a_negative_temperature_are_refused() -> None:
    heads = MultiFrameHeads(16, 4, HeadsConfig(Horizons((1, 2), (1, 2)), patch_sizes=(4, 4)))
    inputs = (torch.randn(2, 4, 4, 4, 16), torch.randn(2, 7, 16), torch.rand(2, 8, 3, 16, 16))
    with pytest.raises(ValueError, match="latent_noise must be None for heads without latent"):
        heads(*inputs, latent_noise=torch.zeros(2, 4, 1, 3))
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        heads.outputs(*inputs, temperature=-1.0)
