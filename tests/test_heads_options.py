"""Options of the heads that hosts need: kinds, near_head, flat tokens, biases, norms, weights of positions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, get_args

import pytest
import torch
from mfwm import HeadsConfig, MultiFrameHeads, WorldModel, WorldModelConfig
from mfwm.models.blocks import LayerNorm
from mfwm.models.distributions import DISTRIBUTIONS, LOG_SCALE_LIMIT, Distribution, Kind
from mfwm.models.rollouts import rollout, rollout_with_drift
from mfwm.training.run_config import from_tree
from mfwm.training.validation import validation_figures
from mfwm.training.world_model import WorldModelLoss
from small_model import HORIZONS, build, clip
from torch import Tensor, nn

from mfwm_kernels import HorizonLoss, Horizons, multi_horizon_linear_cross_entropy, multi_horizon_loss, video_pyramid
from mfwm_kernels.ops import loss_kinds

MIXED: tuple[Kind, ...] = ("mse", "gaussian", "laplace")
TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
TWO = Horizons((1, 2), (1, 2))


def test_kinds_are_those_of_the_op() -> None:
    assert get_args(Kind) == loss_kinds.KINDS and set(DISTRIBUTIONS) == set(loss_kinds.KIND_OF_MEANS)
    assert LOG_SCALE_LIMIT == loss_kinds.LOG_SCALE_LIMIT


@pytest.mark.parametrize("kind", [*get_args(Kind), MIXED], ids=str)
@pytest.mark.parametrize("output", ["pixels", "latents"])
def test_every_kind_trains_predicts_and_rolls_out(kind: Any, output: str) -> None:
    model = build(kind=kind, output=output, blocks=(0, 1, 0), patch_sizes=(4, 4, 1))
    clips = clip(9, model)
    loss = model(**clips)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    found, predicted = model.distributions(**clips), model.predict(**clips)
    parts = video_pyramid(clips["video"], HORIZONS.factors, dtype=torch.float32)
    for i, (distribution, frame) in enumerate(zip(found, predicted, strict=True)):
        assert distribution.mean.shape == (2, 6, *parts[i].shape[2:])
        assert torch.equal(frame, distribution.mean.clamp(-1, 1) if output == "pixels" else distribution.mean)
        assert (distribution.log_scale is not None) == (model.config.heads.kinds[i] in DISTRIBUTIONS)
        if distribution.log_scale is None:
            continue
        # The loss is the likelihood that evaluation reports, less its constant.
        end, offset = min(6, 9 - HORIZONS.offsets[i]), HORIZONS.offsets[i]
        cut = Distribution(distribution.kind, distribution.mean[:, :end], distribution.log_scale[:, :end])
        nats = cut.negative_log_likelihood(parts[i][:, offset : offset + end]).mean()
        constant = 0.5 * math.log(2 * math.pi) if distribution.kind == "gaussian" else math.log(2)
        torch.testing.assert_close(nats - constant, loss.per_horizon[i])
    rolled, drift = rollout_with_drift(model.eval(), clips["video"][:, :4], clips["actions"], 5)
    assert rolled.isfinite().all() and not drift[:, 2:].isnan().all()


def test_the_squared_error_of_the_mean_is_reported_for_every_kind() -> None:
    model = build(kind=MIXED)
    clips = {**clip(9, model), "segment_ids": torch.zeros(2, 9, dtype=torch.int64)}
    figures = validation_figures(model, clips)
    pyramid = video_pyramid(clips["video"], HORIZONS.factors, dtype=torch.float32)
    for i, (offset, found) in enumerate(zip(HORIZONS.offsets, model.distributions(**clips), strict=True)):
        end = min(6, 9 - offset)
        error = (found.mean[:, :end] - pyramid[i][:, offset : offset + end]).square().mean()
        torch.testing.assert_close(figures["squared_error"][i], error)
    torch.testing.assert_close(figures["squared_error"][0], figures["per_horizon"][0])
    assert WorldModelLoss(model).names == ["1", "2_gaussian", "4_laplace"]
    assert "squared_error" not in validation_figures(build(), clips)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_draws_have_the_predicted_mean_and_scale(kind: Any) -> None:
    mean, s = torch.tensor([0.5, -2.0]), torch.tensor([-1.0, 1.0])
    distribution = Distribution(kind, mean.repeat(200_000, 1), s.repeat(200_000, 1))
    generator = torch.Generator().manual_seed(0)
    deviation = distribution.draw(1.0, generator) - mean
    expected = torch.exp(s / 2 if kind == "gaussian" else s)
    measured = deviation.square().mean(0).sqrt() if kind == "gaussian" else deviation.abs().mean(0)
    torch.testing.assert_close(measured, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(deviation.mean(0) / expected, torch.zeros(2), rtol=0, atol=0.02)
    assert (deviation < 0).float().mean(0).sub(0.5).abs().max() < 0.01
    half = distribution.draw(0.5, torch.Generator().manual_seed(0)) - mean
    torch.testing.assert_close(half, deviation / 2)
    assert torch.equal(distribution.draw(0.0), distribution.mean)


def test_a_temperature_draws_where_there_is_a_distribution() -> None:
    near, far = build(kind=("gaussian", "mse", "mse")).eval(), build(kind=MIXED).eval()
    clips = clip(8)

    def rolled(model: Any, temperature: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rollout(model, clips["video"][:, :4], clips["actions"], 3, temperature=temperature, generator=generator)

    assert torch.equal(rolled(near, 1.0), rolled(near, 1.0)) and torch.equal(rolled(near, 0.0), rolled(near, 0.0, 1))
    assert not torch.equal(rolled(near, 1.0), rolled(near, 1.0, 1))
    still, drawn = far.predict(**clips), far.predict(**clips, temperature=1.0)
    assert [torch.equal(a, b) for a, b in zip(still, drawn, strict=True)] == [True, False, False]
    with pytest.raises(ValueError, match=r"temperature must be 0 if the near horizon predicts neither .*, got 1\.0"):
        rolled(far, 1.0)
    for model in (build(), build(**TOKENS)):
        with pytest.raises(
            ValueError, match=r"temperature must be 0 where no horizon predicts a distribution, got 1\.0"
        ):
            model.predict(**clip(8, model), temperature=1.0)


def test_an_untrained_distribution_is_the_last_frame_with_one_scale() -> None:
    config = WorldModelConfig((3, 16, 16), 4, 32, 1, 16, context=6, actions=5, heads=HeadsConfig(HORIZONS, kind=MIXED))
    clips = clip()
    kept = video_pyramid(clips["video"], HORIZONS.factors)
    for found, frame in zip(WorldModel(config).distributions(**clips), kept, strict=True):
        torch.testing.assert_close(found.mean, frame)
        if found.log_scale is not None:
            torch.testing.assert_close(found.scale, torch.full_like(frame, math.exp(-1)))


class Readout(nn.Module):
    """A host's head: a norm of its own and a linear map."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Convolution(nn.Module):
    """A host's head that returns images [B, T, C, H, W]."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1).movedim(-1, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("kind", ["l1", "mse", "gaussian"])
def test_near_head_computes_what_the_host_computes(kind: Any) -> None:
    """Its prediction, loss and gradients, to the bit, whatever else the heads predict."""
    torch.manual_seed(0)
    features = 48 * (2 if kind == "gaussian" else 1)
    host, video = Readout(32, features), torch.randint(0, 256, (2, 8, 3, 8, 8), dtype=torch.uint8)
    hidden = torch.randn(2, 6, 2, 2, 32)
    found = []
    for horizons in (Horizons.next_frame(), Horizons((1, 2, 4), (1, 2, 4))):
        config = HeadsConfig(horizons, kind=kind, residual=False, conditioning="none")
        heads = MultiFrameHeads(32, 4, config, near_head=host)
        host.zero_grad()
        heads.loss(heads.outputs(hidden, None, video), video).total.backward()
        found.append([p.grad for p in host.parameters()])
        assert {f"near_head.{name}" for name in host.state_dict()} <= set(heads.state_dict())
        patches = host(hidden).flatten(2, 3)
        own = multi_horizon_loss([patches], video, Horizons.next_frame(), kind=kind, patch_sizes=(4,))
        assert torch.equal(heads(hidden, None, video).per_horizon[0], own.per_horizon[0])
        assert torch.equal(heads.outputs(hidden, None, video, near_only=True)[0], patches)
        host.zero_grad()
        own.total.backward()
        found.append([p.grad for p in host.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))  # type: ignore[arg-type]


def test_near_head_gives_images_and_predicts_the_change_if_residual() -> None:
    for parts, kind in ((1, "mse"), (2, "gaussian")):
        host, hidden = Convolution(32, 4 * parts), torch.randn(1, 3, 6, 8, 32)
        latents = torch.randn(1, 4, 4, 6, 8)
        for residual in (False, True):
            config = HeadsConfig(TWO, output="latents", residual=residual, kind=kind, conditioning="none")  # type: ignore[arg-type]
            heads = MultiFrameHeads(32, 1, config, channels=4, near_head=host)
            mean, *log_scale = host(hidden).chunk(parts, 2)
            near = heads.distributions(hidden, None, latents)[0]
            assert torch.equal(near.mean, mean + latents[:, :3] if residual else mean)
            assert near.log_scale is None or torch.equal(near.log_scale, log_scale[0].clamp(-10, 10))


def test_a_near_head_whose_patches_look_like_frames_returns_them_in_rows() -> None:
    host, hidden, latents = nn.Linear(32, 8), torch.randn(1, 3, 8, 8, 32), torch.randn(1, 4, 8, 8, 8)
    config = HeadsConfig(TWO, output="latents", residual=False, conditioning="none")
    with pytest.raises(ValueError, match=r"near_head must return patches as \[B, T, S, N\] = \[1, 3, 64, 8\] where"):
        MultiFrameHeads(32, 1, config, channels=8, near_head=host).predict(hidden, None, latents)
    heads = MultiFrameHeads(32, 1, config, channels=8, near_head=nn.Sequential(host, nn.Flatten(2, 3)))
    assert torch.equal(heads.predict(hidden, None, latents)[0], host(hidden).movedim(-1, 2))


def test_near_head_reads_the_near_hidden_state_and_far_heads_do_not() -> None:
    host, (hidden, near_hidden) = nn.Linear(32, 48), torch.randn(2, 1, 3, 2, 2, 32)
    config = HeadsConfig(TWO, residual=False, conditioning="none")
    heads, video = MultiFrameHeads(32, 4, config, near_head=host), torch.zeros(1, 5, 3, 8, 8)
    plain, tapped = (heads.outputs(hidden, None, video, near_hidden=near) for near in (None, near_hidden))
    assert torch.equal(plain[0], host(hidden).flatten(2, 3)) and torch.equal(tapped[0], host(near_hidden).flatten(2, 3))
    assert torch.equal(plain[1], tapped[1])


@pytest.mark.parametrize("options", [{}, {"shared_head": True, "bias": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("host_bias", [True, False])
def test_near_head_of_tokens_is_in_the_fused_loss(options: dict[str, Any], host_bias: bool) -> None:
    torch.manual_seed(0)
    host = nn.Linear(32, 7, bias=host_bias)
    config = HeadsConfig(TWO, **TOKENS, conditioning="none", **options)
    heads = MultiFrameHeads(32, 1, config, near_head=host)
    hidden, tokens = torch.randn(2, 4, 4, 4, 32, requires_grad=True), torch.randint(0, 7, (2, 5, 4, 4))
    loss = heads(hidden, None, tokens)
    own = multi_horizon_linear_cross_entropy(
        [hidden], host.weight, tokens, Horizons.next_frame(), biases=None if host.bias is None else [host.bias]
    )
    assert torch.equal(loss.per_horizon[0], own.per_horizon[0])
    torch.testing.assert_close(
        own.total, nn.functional.cross_entropy(host(hidden).flatten(0, 3), tokens[:, 1:].flatten())
    )
    logits, far = heads.predict(hidden, None, tokens)
    assert torch.equal(logits, host(hidden))
    assert (heads.heads[1] is host) == config.shared_head and far.shape == (2, 4, 2, 2, 7)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in heads.parameters())


class Scaled(nn.Linear):
    """A muP readout: its forward is more than F.linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 4)


def test_near_heads_that_do_not_fit_are_refused() -> None:
    tokens = HeadsConfig(TWO, **TOKENS, conditioning="none")
    hooked, patched = nn.Linear(32, 7), nn.Linear(32, 7)
    hooked.register_forward_pre_hook(lambda module, args: None)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for head in (Scaled(32, 7), nn.Sequential(nn.Linear(32, 7)), hooked, patched):
        with pytest.raises(ValueError, match=r"near_head must be an nn\.Linear for tokens, .* got (Sc|Seq|Lin)"):
            MultiFrameHeads(32, 1, tokens, near_head=head)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (nn.Linear(32, 8), {**TOKENS}, r"near_head must have a weight .* = \[7, 32\], got \[8, 32\]"),
        (nn.Linear(32, 7), {**TOKENS, "horizons": Horizons((1,), (2,))}, r"factors\[0\] must be 1 for tokens"),
        (nn.Linear(32, 48), {"blocks": (1, 0)}, r"blocks\[0\] must be 0 with near_head"),
        (nn.Linear(32, 48), {"weighting": "gradients"}, "need two horizons beside near_head"),
        (torch.zeros(1), {}, "near_head must be an nn.Module, got Tensor"),
        (nn.Linear(32, 48), {"horizons": Horizons((1, 1), (1, 2)), "upsampler": 8}, "if an upsampler computes"),
        (nn.Linear(32, 48), {"near_decoder": 8}, "near_head must be None with near_decoder, .* got near_decoder 8"),
    ]
    for head, options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            MultiFrameHeads(32, 1, HeadsConfig(**{"horizons": TWO, "conditioning": "none", **options}), near_head=head)
    heads = MultiFrameHeads(32, 4, HeadsConfig(TWO, conditioning="none"), near_head=nn.Linear(32, 47))
    with pytest.raises(ValueError, match=r"near_head must return patches \[B, T, H, W, N\] = \[1, 3, 2, 2, 48\]"):
        heads(torch.zeros(1, 3, 2, 2, 32), None, torch.zeros(1, 4, 3, 8, 8))


GRID = (4, 8)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"output": "latents", "kind": MIXED}, 1),
        ({"output": "latents", "blocks": (0, 1, 1), "attend": "inputs"}, 1),
        ({"output": "latents", "contrast": 1.0, "latent_consistency": 1.0, "temporal_difference": 1.0, "latent": 3}, 1),
        ({**TOKENS, "contrast": 1.0, "latent_consistency": 1.0}, 1),
        ({**TOKENS, "bias": True, "consistency": (0.0, 0.1, 0.1)}, 1),
        ({**TOKENS, "shared_head": True}, 2),
        ({**TOKENS, "token_targets": "tokenised"}, 1),
    ],
    ids=str,
)
def test_flat_tokens_are_those_of_the_grid(options: dict[str, Any], ids: int, near: bool) -> None:
    """Losses, gradients and predictions are the same bits, in the host's layout."""
    config = HeadsConfig(HORIZONS, residual=False, **options)
    channels = 5
    torch.manual_seed(0)
    columns = 7 * ids if config.output == "tokens" else channels
    near_head = nn.Linear(32, columns) if near else None
    given: dict[str, Any] = {"channels": channels, "ids_per_token": ids, "near_head": near_head}
    grid = MultiFrameHeads(32, 1, config, **given)
    flat = MultiFrameHeads(32, 1, config, **given, grid=GRID)
    flat.load_state_dict(grid.state_dict())
    hidden, inputs = torch.randn(2, 2, 5, *GRID, 32)
    more: dict[str, Any] = {"segment_ids": torch.tensor([[0] * 7, [0] * 3 + [1] * 4])}
    if config.output == "tokens":
        video = torch.randint(0, 7, (2, 7, *GRID, *((ids,) if ids > 1 else ())))
        flat_video = video.flatten(2, 3)
        more["return_predictions"] = True
        if config.token_targets == "tokenised":
            more["low_tokens"] = {f: torch.randint(0, 7, (2, 7, 4 // f, 8 // f)) for f in (2, 4)}
    else:
        video = torch.randn(2, 7, channels, *GRID)
        flat_video = video.flatten(3).mT
    flat_more = {**more, "low_tokens": {f: x.flatten(2, 3) for f, x in more.get("low_tokens", {}).items()}}
    if config.attend == "inputs":
        more["inputs"], flat_more["inputs"] = inputs, inputs.flatten(2, 3)
    if config.latent is not None:
        more["latent_noise"] = flat_more["latent_noise"] = torch.randn(2, 5, 2, config.latent)
    actions = torch.randn(2, 7, 32)
    results = []
    for heads, frames, state, extra in (
        (grid, video, hidden, more),
        (flat, flat_video, hidden.flatten(2, 3), flat_more),
    ):
        heads.zero_grad()
        leaf = state.clone().requires_grad_()
        loss = heads(leaf, actions, frames, **extra)
        loss.total.backward()
        assert leaf.grad is not None
        reads = {name: value for name, value in extra.items() if name in ("segment_ids", "inputs")}
        results.append((loss, leaf.grad.view_as(hidden), heads.predict(state, actions, frames, **reads)))
    (loss, gradient, predicted), (flat_loss, flat_gradient, flat_predicted) = results
    assert torch.equal(loss.total, flat_loss.total) and torch.equal(loss.per_horizon, flat_loss.per_horizon)
    if near and config.contrast:
        # One of three readers of the hidden state reads it as the host gave it, so gradients add up in another order.
        torch.testing.assert_close(gradient, flat_gradient, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(gradient, flat_gradient)
    assert all(torch.equal(term, flat_loss.terms[name]) for name, term in loss.terms.items())
    for x, y in zip(predicted, flat_predicted, strict=True):
        assert torch.equal(x.flatten(2, 3) if config.output == "tokens" else x.flatten(3).mT, y)
    for i, (x, y) in enumerate(zip(loss.predictions or (), flat_loss.predictions or (), strict=True)):
        assert torch.equal(x.flatten(2, 3), y)
        z = flat_predicted[i]
        assert torch.equal(y, z.argmax(-1))


def test_layouts_that_do_not_fit_are_refused() -> None:
    config = HeadsConfig(TWO, conditioning="none", output="latents", residual=False)
    hidden, latents = torch.zeros(1, 3, 16, 32), torch.zeros(1, 4, 16, 3)
    with pytest.raises(ValueError, match=r"hidden must have 5 dimensions, .*needs grid=\(H, W\)"):
        MultiFrameHeads(32, 1, config)(hidden, None, latents)
    with pytest.raises(ValueError, match=r"grid must have Hp \* Wp = 16.*; got 4 x 8"):
        MultiFrameHeads(32, 1, config, grid=GRID)(hidden, None, latents)
    with pytest.raises(ValueError, match=r"hidden must have 4 dimensions, \[B, T, S, D\] with grid"):
        MultiFrameHeads(32, 1, config, grid=(4, 4))(hidden.unflatten(2, (4, 4)), None, latents)
    with pytest.raises(ValueError, match=r"grid must be a pair of integers .*, got \(16,\)"):
        MultiFrameHeads(32, 1, config, grid=(16,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"video must be images .* for a patch_size of 2"):
        MultiFrameHeads(32, 2, config, grid=(4, 4))(hidden, None, latents)


@pytest.mark.parametrize("options", [{}, {"blocks": (0, 1)}, {"conditioning": "frames"}, TOKENS], ids=str)
def test_layer_norm_is_that_of_torch(options: dict[str, Any]) -> None:
    config = HeadsConfig(Horizons((1, 2), (1, 1)), residual=False, norm="layer", **options)
    heads = MultiFrameHeads(32, 1 if config.output == "tokens" else 4, config)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, actions, inputs = torch.randn(2, 4, 2, 2, 32), torch.randn(2, 6, 32), torch.randn(2, 6, 2, 2, 32)
    given = None if config.conditioning == "frames" else actions
    video = torch.randint(0, 7, (2, 6, 2, 2)) if config.output == "tokens" else torch.zeros(2, 6, 3, 8, 8)
    outputs = heads.outputs(hidden, given, video, inputs=inputs)
    if config.conditioning == "frames":
        assert heads.norm_weight is None
        weight, bias = heads.last_norms[0].weight, heads.last_norms[0].bias
    else:
        assert heads.norm_weight is not None and heads.norm_bias is not None
        weight, bias = heads.norm_weight[0], heads.norm_bias[0]
    state = nn.functional.layer_norm(hidden, (32,), weight, bias, 1e-6)  # type: ignore[arg-type]
    expected = state if config.output == "tokens" else heads.heads[0](state).flatten(2, 3)
    torch.testing.assert_close(outputs[0], expected)
    assert isinstance(heads.last_norms[1], LayerNorm) == (config.blocks is not None or given is None)


def test_biases_of_tokens_are_in_loss_and_logits() -> None:
    model = build(**TOKENS, bias=True)
    for head in model.heads.heads:
        nn.init.normal_(head.bias)  # type: ignore[arg-type]
    clips = clip(8, model)
    logits, loss = model.predict(**clips), model(**clips)
    near = nn.functional.cross_entropy(logits[0].flatten(0, 3), clips["video"][:, 1:7].flatten())
    torch.testing.assert_close(loss.per_horizon[0], near)
    assert all(head.bias is None for head in build(**TOKENS).heads.heads)


def test_position_weights_leave_positions_out() -> None:
    """As a segment of their own does, in every kind of loss."""
    for options in ({}, TOKENS, {**TOKENS, "token_targets": "tokenised"}, {"kind": MIXED}):
        model = build(**options)
        clips = clip(10, model)
        low = {f: torch.randint(0, 7, (2, 10, 8 // f, 8 // f)) for f in (2, 4)}
        more = {"low_tokens": low} if "token_targets" in options else {}
        states = model.states(**clips)
        weights = torch.ones(2, 6, 3)
        weights[:, 3:] = 0
        weights[:, 1, 2] = 0

        def loss_of(weights: Tensor | None, **states: Any) -> HorizonLoss:
            return model.heads(video=clips["video"], position_weights=weights, **more, **states)  # noqa: B023

        loss, full = loss_of(weights, **states), loss_of(None, **states)
        assert torch.equal(loss.counts[:2], full.counts[:2] // 2) and loss.counts[2] == full.counts[2] // 3
        read = ("hidden", "near_hidden", "inputs")
        cut = {name: x[:, :3] if name in read and x is not None else x for name, x in states.items()}
        torch.testing.assert_close(loss.per_horizon, loss_of(weights[:, :3], **cut).per_horizon)
        heavier = loss_of(2 * weights, **states)
        torch.testing.assert_close(heavier.per_horizon, 2 * loss.per_horizon)


def test_actions_may_be_fewer_or_more_than_frames() -> None:
    heads = MultiFrameHeads(32, 4, HeadsConfig(HORIZONS, residual=False))
    hidden, actions, video = torch.randn(2, 5, 2, 2, 32), torch.randn(2, 9, 32), torch.zeros(2, 7, 3, 8, 8)
    segments = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    padded = torch.cat([actions[:, :4], torch.zeros(2, 3, 32)], 1)
    few = heads.predict(hidden, actions[:, :4], video, segment_ids=segments[:, :7])
    for x, y in zip(few, heads.predict(hidden, padded, video, segment_ids=segments[:, :7]), strict=True):
        torch.testing.assert_close(x, y)
    many = heads.predict(hidden, actions, video, segment_ids=segments)
    for x, y in zip(many, heads.predict(hidden, actions[:, :7], video, segment_ids=segments[:, :7]), strict=True):
        assert torch.equal(x[:, :4], y[:, :4])
    loss = heads(hidden, actions, video, segment_ids=segments)
    assert torch.equal(loss.counts, heads(hidden, actions[:, :7], video, segment_ids=segments[:, :7]).counts)
    with pytest.raises(ValueError, match=r"segment_ids must have a column for each frame and action, \[B, 9\]"):
        heads(hidden, actions, video, segment_ids=segments[:, :7])


def test_head_width_is_of_blocks() -> None:
    video, hidden = torch.zeros(1, 4, 3, 8, 8), torch.randn(1, 3, 2, 2, 34)
    MultiFrameHeads(34, 4, HeadsConfig(TWO, conditioning="none"))(hidden, None, video)
    with pytest.raises(ValueError, match="head_width must divide width = 34, got 32"):
        MultiFrameHeads(34, 4, HeadsConfig(TWO, conditioning="none", blocks=(0, 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "laplace", "motion_gain": 0.5},
        {"kind": ("mse", "gaussian", "gaussian", "l1"), "beta": 0.5, "norm": "layer"},
        {"kind": ("charbonnier",) * 4, "norm": None, "eps": 0.1, "delta": 2.0},
        {**TOKENS, "bias": True},
    ],
    ids=str,
)
def test_configs_survive_json(options: dict[str, Any]) -> None:
    config = HeadsConfig(**options)
    assert from_tree(HeadsConfig, json.loads(json.dumps(asdict(config))), "config.json") == config
    if config.output != "tokens":
        assert HeadsConfig(**{**options, "kind": list(config.kinds)}).kinds == config.kinds


def test_configs_of_before_are_refused_by_name() -> None:
    tree = {**asdict(HeadsConfig()), "norm": True}
    with pytest.raises(ValueError, match=r"config.json: norm must be Literal\['rms', 'layer'\] or NoneType, got True"):
        from_tree(HeadsConfig, tree, "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l2"}, "kind must be one of 'mse', 'l1', .*; got 'l2'"),
        ({"kind": ("mse", "mse", "mse", "l2")}, r"kind\[3\] must be one of 'mse', .*; got 'l2'"),
        ({"kind": ("mse", "l1")}, "kind must be one or have one entry per horizon, 4; got"),
        ({"beta": -1.0, "kind": "gaussian"}, "beta must be >= 0, got -1.0"),
        ({"beta": 0.5}, 'beta needs a horizon of kind "gaussian", got 0.5'),
        ({"motion_gain": -0.5}, "motion_gain must be >= 0"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({**TOKENS, "kind": "l1"}, "kind is of the loss of pixels and latents, and the output is tokens; got 'l1'"),
        ({**TOKENS, "motion_gain": 1.0}, "motion_gain is of the loss of pixels and latents"),
        ({"bias": True}, "shared_head, bias and token_targets need output \"tokens\", got 'pixels'"),
        ({"kind": "gaussian", "weighting": "uncertainty"}, 'weighting "uncertainty" must not go with "gaussian"'),
        (
            {"kind": "laplace", "upsampler": 8, "horizons": Horizons((1, 1), (1, 2))},
            r"kind\[0\] must be a function of the difference if the upsampler",
        ),
        ({"norm": True}, "norm must be one of 'rms', 'layer'; got True"),
        ({"horizons": (1, 2)}, "horizons must be a Horizons, got tuple"),
        ({"residual": 1}, "residual must be True or False, got 1"),
        ({"lag_gate": "no"}, "lag_gate must be True or False, got 'no'"),
        ({"surgery": None}, "surgery must be True or False, got None"),
        ({**TOKENS, "bias": 1}, "bias must be True or False, got 1"),
        ({"vocabulary": None}, "vocabulary must be an integer, got None"),
        ({"output": "tokens", "vocabulary": 1.5}, "vocabulary must be an integer, got 1.5"),
        ({"upsampler": 0}, "upsampler must be >= 1, got 0"),
        ({"tap": True}, "tap must be an integer, got True"),
        ({"blocks": 2}, "blocks must be a sequence of integers, got int"),
        ({"blocks": (0, 0, 0, 1.5)}, r"blocks\[3\] must be an integer, got 1.5"),
        ({"patch_sizes": "1111"}, "patch_sizes must be a sequence of integers, got str"),
        ({"mlp_ratios": (1, 0, 1, 1)}, r"mlp_ratios\[1\] must be >= 1, got 0"),
        ({"weights": 1.0}, "weights must be a tuple of numbers, got float"),
        ({"weights": (1, 1, math.nan, 1)}, r"weights\[2\] must be finite, got nan"),
        ({"weights": (1, True, 1, 1)}, r"weights\[1\] must be a number, got bool"),
        ({"consistency": "0111"}, "consistency must be a tuple of numbers, got str"),
        ({"consistency": ((0, 1, 1, 1), None, None, None)}, r"consistency\[1\] must be a tuple of numbers, got None"),
        ({"consistency": ((0, math.inf, 1, 1),) * 4}, r"consistency\[0\]\[1\] must be finite, got inf"),
        ({"beta": True, "kind": "gaussian"}, "beta must be a number, got bool"),
        ({"kind": ()}, r"kind must be one or have one entry per horizon, 4; got \(\)"),
        ({"kind": torch.ones(2)}, "kind must be one of 'mse', "),
    ],
)
def test_heads_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        HeadsConfig(**options)


def test_heads_of_a_host_compile_whole() -> None:
    for config, ids, near in (
        (
            HeadsConfig(TWO, kind=("l1", "gaussian"), norm="layer", output="latents", motion_gain=0.5),
            1,
            nn.Linear(32, 3),
        ),
        (HeadsConfig(TWO, **TOKENS, bias=True), 2, nn.Linear(32, 14)),
    ):
        heads = MultiFrameHeads(32, 1, config, ids_per_token=ids, near_head=near, grid=(2, 2))
        hidden, actions = torch.randn(2, 4, 4, 32), torch.randn(2, 3, 32)
        video = torch.randint(0, 7, (2, 6, 4, 2)) if config.output == "tokens" else torch.randn(2, 6, 4, 3)
        weights, found = torch.rand(2, 4), []
        for run in (heads, torch.compile(heads, fullgraph=True, backend="eager")):
            heads.zero_grad()
            loss = run(hidden, actions, video, position_weights=weights)
            loss.total.backward()
            found.append((loss.total, [p.grad for p in heads.parameters()]))
        torch.testing.assert_close(found[1], found[0])


def test_near_head_is_autocast_as_in_the_host() -> None:
    """Its norm reads the hidden state in fp32, as it does in the host, and not one that was rounded to bf16."""
    host, hidden = Readout(32, 48), torch.randn(1, 3, 2, 2, 32)
    heads = MultiFrameHeads(32, 4, HeadsConfig(TWO, residual=False, conditioning="none"), near_head=host)
    video = torch.zeros(1, 5, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        near, far = heads.outputs(hidden, None, video)
        assert torch.equal(near, host(hidden).flatten(2, 3)) and far.dtype == torch.bfloat16
        heads(hidden, None, video).total.backward()
    assert all(p.grad is not None for p in heads.parameters())
