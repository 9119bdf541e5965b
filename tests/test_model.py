"""The model: causality, every option alive, the zero start, rollouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from mfwm import HeadsConfig, MultiFrameHeads, WorldModel, WorldModelConfig
from mfwm.models.blocks import RMSNorm, SpaceTimeBlock, rotate, time_mask
from mfwm.models.rollouts import rollout
from mfwm.models.upsampler import Analogy, Upsampler, unpatchify
from mfwm.training.validation import validation_figures
from mfwm.training.world_model import WorldModelLoss
from small_model import HORIZONS, OPTIONS, TOKENS, build, clip, targets
from torch import nn

from mfwm_kernels import GradMonitor, Horizons, video_pyramid

options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options_of_all
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = build(**options)
    clips = targets(model, clip(10, model))
    loss = model(**clips, segment_ids=torch.zeros(2, 10, dtype=torch.int64))
    assert loss.per_horizon.isfinite().all() and (loss.counts > 0).all()
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


@options_of_all
def test_the_loss_falls(options: dict[str, Any]) -> None:
    """Of every horizon, on one batch of frames that stand still."""
    torch.manual_seed(0)
    model = build(**options)
    clips = clip(9, model)
    clips["video"][:, 1:] = clips["video"][:, :1]
    if model.tokens:
        # Of one id each: the cross-entropy of a mix of ids cannot fall below the entropy of the mix.
        clips["video"][:] = clips["video"][:, :, :1, :1]
    clips = targets(model, clips)
    if "low_tokens" in clips:
        clips["low_tokens"] = {f: ids[:, :1, :1, :1].expand_as(ids) for f, ids in clips["low_tokens"].items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**clips)
        losses.append(loss.per_horizon)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert (losses[-1] < 0.8 * losses[0]).all(), (losses[0], losses[-1])


def test_options_tell_apart() -> None:
    """Each option changes the predictions of a model with the same seed, or its loss."""
    losses = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(3)
        model = build(**options)
        torch.manual_seed(4)
        losses[name] = model(**targets(model, clip(10, model))).total.item()
    # Gates start at 1, a plain sum; balance and surgery concern gradients alone: their own tests tell them apart.
    for name in ("gated", "uncertainty", "balanced gradients", "surgery", "surgery on balanced gradients"):
        losses.pop(name)
    losses.pop("tokens, tokenised, uncertainty")
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.parametrize("options", [{}, TOKENS, {**TOKENS, "token_targets": "tokenised"}], ids=str)
def test_the_total_is_weighted_as_configured(options: dict[str, Any]) -> None:
    weights, consistency = (1.0, 0.5, 0.25), None if "token_targets" in options else (0.0, 0.3, 0.2)
    model = build(weights=weights, consistency=consistency, **options)
    loss = model(**targets(model, clip(10, model)))
    total = (torch.tensor(weights) * loss.per_horizon).sum()
    if consistency is not None:
        total = total + (torch.tensor(consistency) * loss.consistency).sum()
    torch.testing.assert_close(loss.total, total)


def test_appending_is_the_block_over_each_longer_sequence() -> None:
    torch.manual_seed(0)
    block = SpaceTimeBlock(32, 16, rotary=True)
    seen, x = torch.randn(2, 5, 3, 32), torch.randn(2, 5, 3, 32)
    segments = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    appended = block.append(x, seen, time_mask(segments, 5))
    for clip_, n in ((0, 0), (0, 3), (1, 1), (1, 4)):
        first = int((segments[clip_] == segments[clip_, n]).nonzero()[0])
        sequence = torch.cat([seen[clip_, first : n + 1], x[clip_, n : n + 1]])
        torch.testing.assert_close(block(sequence[None], None)[0, -1], appended[clip_, n])


def test_blocks_on_inputs_see_one_conditioned_state_each() -> None:
    """Position n reads the hidden state of n alone, and the inputs of frames <= n; on states, hidden states <= n."""
    read = {}
    for attend in ("states", "inputs"):
        heads = MultiFrameHeads(
            32, 4, HeadsConfig(Horizons((2,), (1,)), blocks=(2,), attend=attend, residual=False)  # type: ignore[arg-type]
        )  # fmt: skip
        hidden, inputs = (torch.randn(1, 5, 2, 2, 32, requires_grad=True) for _ in range(2))
        (patches,) = heads.outputs(hidden, torch.randn(1, 5, 32), torch.zeros(1, 5, 3, 8, 8), inputs=inputs)
        found = torch.autograd.grad(patches[:, 3].square().sum(), (hidden, inputs), allow_unused=True)
        read[attend] = [() if g is None else tuple((g.flatten(2).norm(dim=-1) > 0)[0].tolist()) for g in found]
    upto_3 = (True, True, True, True, False)
    assert read == {"states": [upto_3, ()], "inputs": [(False, False, False, True, False), upto_3]}


def test_frames_chain_is_joins_and_blocks_one_after_another() -> None:
    """s_1 = hidden; s_2 = block(join_1(s_1, frame n + 1)); s_4 = block(join_3(join_2(s_2, n + 2), n + 3))."""
    torch.manual_seed(0)
    heads = MultiFrameHeads(
        32, 4, HeadsConfig(Horizons((1, 2, 4), (1, 1, 1)), blocks=(0, 1, 1), conditioning="frames", residual=False)
    )
    hidden, inputs = torch.randn(2, 3, 2, 2, 32), torch.randn(2, 6, 2, 2, 32)
    outputs = heads.outputs(hidden, None, torch.zeros(2, 3, 3, 8, 8), inputs=inputs)
    joined = heads.joins[0](hidden, inputs[:, 1:4])
    second = heads.blocks[1][0](joined.flatten(2, 3), None).view_as(hidden)  # type: ignore[index]
    joined = heads.joins[2](heads.joins[1](second, inputs[:, 2:5]), inputs[:, 3:6])
    fourth = heads.blocks[2][0](joined.flatten(2, 3), None)  # type: ignore[index]
    torch.testing.assert_close(outputs[1], heads.heads[1](heads.last_norms[1](second.flatten(2, 3))))
    torch.testing.assert_close(outputs[2], heads.heads[2](heads.last_norms[2](fourth)))


def test_patches_and_back() -> None:
    images = torch.randn(2, 3, 4, 8, 12)
    (patches,) = video_pyramid(images, (1,), patch_sizes=(4,))
    assert torch.equal(unpatchify(patches, 4, 4, 8, 12), images)


@pytest.mark.parametrize("upsampling", ["correction", "analogy"])
def test_upsampler_is_trained_on_top(upsampling: str) -> None:
    """Its loss moves it alone: the hidden state learns from the small targets."""
    horizons = Horizons((1, 1, 2), (1, 2, 2))
    model = build(horizons=horizons, upsampler=8, upsampling=upsampling, weights=(1.0, 0.0, 0.0))
    model(**clip(10)).total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("heads.upsampler")}


@pytest.mark.parametrize("kind", [Upsampler, Analogy])
def test_upsampler_reads_one_position(kind: Any) -> None:
    upsampler = kind(3, 2, 8)
    nn.init.normal_(upsampler.conv_out.weight)
    small, seen = torch.randn(2, 4, 3, 4, 4, requires_grad=True), torch.randn(2, 4, 3, 8, 8, requires_grad=True)
    for found in torch.autograd.grad(upsampler(small, seen)[:, 2].square().sum(), (small, seen)):
        assert (found.flatten(2).norm(dim=-1) > 0).tolist() == [[False, False, True, False]] * 2


def test_an_analogy_is_that_of_the_formula() -> None:
    analogy = Analogy(3, 2, 8)
    nn.init.normal_(analogy.conv_out.weight)
    small, last = torch.randn(1, 1, 3, 4, 4), torch.randn(1, 1, 3, 8, 8)
    low = nn.functional.avg_pool2d(last[0], 2)
    x = analogy.structure(small[0]) - analogy.structure(low)
    x = x + analogy.appearance(nn.functional.pixel_unshuffle(last[0], 2))
    decoded = analogy.conv_out(nn.functional.gelu(analogy.conv_mid(nn.functional.gelu(x))))
    decoded = nn.functional.pixel_shuffle(decoded, 2)
    detail = last[0] - nn.functional.interpolate(low, scale_factor=2)
    expected = nn.functional.interpolate(small[0], scale_factor=2) + torch.sigmoid(decoded[:, 3:]) * detail
    torch.testing.assert_close(analogy(small, last)[0], expected + decoded[:, :3])
    # Untrained, where nothing changed, it gives the small frame and half the detail of the last one.
    fresh = Analogy(3, 2, 8)(low[None], last)
    torch.testing.assert_close(fresh[0], nn.functional.interpolate(low, scale_factor=2) + detail / 2)


def test_tokenised_targets_are_read_from_the_small_frames() -> None:
    model = build(**TOKENS, token_targets="tokenised", weights=(1.0, 0.5, 2.0))
    clips = targets(model, clip(8, model))
    loss = model(**clips)
    logits = model.predict(**clip_only(clips))
    expected, right = [], []
    for offset, factor, z in zip(*(HORIZONS.offsets, HORIZONS.factors), logits, strict=True):
        ids = clips["video"] if factor == 1 else clips["low_tokens"][factor]
        end = min(6, 8 - offset)
        expected.append(nn.functional.cross_entropy(z[:, :end].flatten(0, 3), ids[:, offset : offset + end].flatten()))
        right.append((z[:, :end].argmax(-1) == ids[:, offset : offset + end]).float().mean())
    torch.testing.assert_close(loss.per_horizon, torch.stack(expected), check_dtype=False)
    torch.testing.assert_close(loss.accuracy, torch.stack(right), check_dtype=False)
    assert loss.total.item() == pytest.approx(expected[0].item() + 0.5 * expected[1].item() + 2 * expected[2].item())
    with pytest.raises(ValueError, match=r"low_tokens must have the ids of factor 2, got factors \[4\]"):
        model(**{**clips, "low_tokens": {4: clips["low_tokens"][4]}})


def test_accuracies_are_logged() -> None:
    """Each times its horizon's share of what counts, as the losses are."""
    model = build(**TOKENS)
    shares = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.5, 0.1], [0.1, 0.1, 0.25], [0.1] * 3, [0.1] * 3, [0.1] * 3])
    clips = {**clip(8, model), "segment_ids": torch.zeros(2, 8, dtype=torch.int64)}
    _, figures = WorldModelLoss(model)(clips, shares)
    accuracy = model(**clips).accuracy
    assert accuracy is not None and torch.equal(figures["accuracy"], accuracy * shares.diagonal())
    assert torch.equal(validation_figures(model, clips)["accuracy"], accuracy)


def clip_only(clips: dict[str, Any]) -> dict[str, Any]:
    return {name: clips[name] for name in ("video", "actions")}


def test_latents_have_no_bounds() -> None:
    model = build(output="latents")
    clips = clip(model=model)
    assert max(prediction.abs().max() for prediction in model.predict(**clips)) > 1
    assert max(prediction.abs().max() for prediction in build().predict(**clips)) == 1


def test_recomputing_changes_no_gradient() -> None:
    gradients_of = {}
    clips = clip(10)
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(trunk={"recompute": recompute}, blocks=(0, 1, 1))
        model(**clips).total.backward()
        gradients_of[recompute] = [p.grad for p in model.parameters()]
    torch.testing.assert_close(gradients_of[True], gradients_of[False])


def compiled_equals_eager(model: WorldModel, clips: dict[str, Any], compiler: str = "aot_eager") -> None:
    """Without a graph break, forward and backward."""
    # Else the models of earlier tests count towards the limit of graphs per function, 8.
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(**clips)
        loss.total.backward()
        found.append((loss.total, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_compiles_whole() -> None:
    model = build(trunk={"layers": 1, "recompute": True, "positions": "rope"})
    compiled_equals_eager(model, clip(9, model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["blocks", "blocks on inputs", "frames", "upsampler", "analogy", "tokens", "raster", "masked, blocks, tap"],
)
def test_every_kind_of_model_compiles_whole(name: str) -> None:
    """By dynamo alone, which finds what breaks a graph. aot_eager takes as long again, and has test_compiles_whole."""
    model = build(**OPTIONS[name])
    clips = clip(9, model)
    if model.config.masked:
        clips["token_mask"] = torch.rand(2, 9, 8, 8) < 0.5
    compiled_equals_eager(model, clips, "eager")


def test_rotary_positions_tell_the_order_of_frames() -> None:
    """One block without them gives the last frame the same whatever order the others came in."""
    assert build(trunk={"positions": "rope"}).time is None
    x = torch.randn(2, 6, 4, 32)
    for rotary in (False, True):
        block = SpaceTimeBlock(32, 16, rotary=rotary)
        swapped = block(x[:, [1, 0, 2, 3, 4, 5]], None)[:, -1]
        assert torch.allclose(swapped, block(x, None)[:, -1], atol=1e-5) != rotary
    q, k = torch.randn(2, 1, 3, 16)
    scores = rotate(q, 0) @ rotate(k, 0).mT
    torch.testing.assert_close(rotate(q, 5) @ rotate(k, 5).mT, scores)


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_norms_are_rms_norms_trained_and_not(dimensions: int) -> None:
    shape = (2, 3, 4, 8)[4 - dimensions :]
    x, gradient = torch.randn(2, *shape)
    x.requires_grad_()
    norm = RMSNorm(8)
    nn.init.normal_(norm.weight)
    expected = nn.functional.rms_norm(x, (8,), norm.weight, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x), expected)
    pairs = [torch.autograd.grad(y, (x, norm.weight), gradient) for y in (norm(x), expected)]
    torch.testing.assert_close(*pairs)


def test_print_shows_horizons_sizes_and_options() -> None:
    """As modules of torch.nn do: sizes always, options where they are not at their default."""
    lines = str(build(blocks=(0, 1, 1), patch_sizes=(4, 4, 2), trunk={"positions": "rope"})).splitlines()
    assert lines[1] == (
        "  frame=(3, 16, 16), patch=4, width=32, layers=2, head_width=16, context=6, actions=5, positions='rope'"
    )
    assert (
        "    width=32, patch_size=4, channels=3, horizons=Horizons(offsets=(1, 2, 4), factors=(1, 2, 4)), "
        "patch_sizes=(4, 4, 2), blocks=(0, 1, 1)"
    ) in lines


def test_tokens_have_one_id_unless_told_otherwise() -> None:
    """However many channels the frames of pixels have."""
    config = HeadsConfig(Horizons.next_frame(), output="tokens", vocabulary=7, conditioning="none")
    for ids, shape in ((1, (7,)), (3, (3, 7))):
        heads = MultiFrameHeads(32, 1, config, **({} if ids == 1 else {"ids_per_token": ids}))
        hidden, tokens = torch.randn(1, 2, 4, 4, 32), torch.zeros(1, 2, 4, 4, *shape[:-1], dtype=torch.int64)
        (logits,) = heads.predict(hidden, None, tokens)
        assert logits.shape == (1, 2, 4, 4, *shape)


def test_untrained_model_keeps_the_last_frame() -> None:
    config = WorldModelConfig((3, 16, 16), 4, 32, 1, 16, context=6, actions=5, heads=HeadsConfig(horizons=HORIZONS))
    clips = clip()
    model = WorldModel(config)
    kept = video_pyramid(clips["video"], HORIZONS.factors)
    for prediction, frame in zip(model.predict(**clips), kept, strict=True):
        torch.testing.assert_close(prediction, frame)
    rolled = rollout(model, clips["video"][:, :3], clips["actions"], 4)
    torch.testing.assert_close(rolled, kept[0][:, 2:3].expand(-1, 4, -1, -1, -1))


def test_rollout_feeds_back_its_own_frames() -> None:
    model, clips = build().eval(), clip(12)
    rolled = rollout(model, clips["video"][:, :4], clips["actions"], 8, keep=6)
    (frames,) = video_pyramid(clips["video"][:, :4], (1,))
    for step in range(8):
        start = max(0, frames.shape[1] - model.config.context)
        following = model.predict(frames[:, start:], clips["actions"][:, start : frames.shape[1]])[0][:, -1:]
        torch.testing.assert_close(rolled[:, step : step + 1], following)
        frames = torch.cat([frames, following], dim=1)
    with pytest.raises(ValueError, match=r"actions must cover frames 0\.\.10, got 5"):
        rollout(model, clips["video"][:, :4], clips["actions"][:, :5], 8)


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
        ({"patch": 0}, "patch must be >= 1, got 0"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"actions": -1}, "actions must be >= 0, got -1"),
        ({"frame": (3, 0, 64)}, r"frame\[1\] must be >= 1, got 0"),
        ({"frame": (64, 64)}, r"frame must be \(channels, height, width\), got \(64, 64\)"),
        ({"width": 100}, "head_width must divide width = 100"),
        ({"actions": 0}, r'heads\.conditioning must be "none"'),
        (
            {"frame": (1, 4, 4), "patch": 4, "heads": HeadsConfig(**TOKENS)},
            "patch must be 1 for frames of tokens, got 4",
        ),
        ({"positions": "sine"}, "positions must be one of 'learned', 'rope'; got 'sine'"),
        ({"window": 4}, 'window must be >= 1, with positions "rope"; got 4, with positions "learned"'),
        ({"width": 96, "head_width": 3, "positions": "rope"}, "head_width must be even for rotary positions, got 3"),
    ],
)
def test_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**options)


@pytest.mark.parametrize(
    ("frame", "patch", "heads", "message"),
    [
        ((3, 12, 12), 4, {"patch_sizes": (4, 4)}, r"multiple of 8 pixels for horizon 1, .* patches of 4; got 12 x 12"),
        ((3, 16, 12), 4, {"patch_sizes": (4, 4)}, r"multiple of 8 pixels for horizon 1, .*; got 16 x 12"),
        ((3, 16, 12), 4, {"patch_sizes": (8, 2)}, r"multiple of 8 pixels for horizon 0, .*; got 16 x 12"),
        ((1, 3, 4), 1, {"output": "tokens", "vocabulary": 8}, r"multiple of 2 pixels for horizon 1, .*; got 3 x 4"),
    ],
)
def test_frames_that_heads_do_not_divide_make_no_model(
    frame: tuple[int, int, int], patch: int, heads: dict[str, Any], message: str
) -> None:
    config = WorldModelConfig(frame, patch, 32, 1, 16, heads=HeadsConfig(Horizons((1, 2), (1, 2)), **heads))
    with pytest.raises(ValueError, match=f"frame must be a {message}"):
        WorldModel(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attend": "past"}, "attend must be one of 'states', 'inputs'; got 'past'"),
        ({"weighting": None}, "weighting must be one of 'fixed', 'uncertainty', 'gradients'; got None"),
        ({"detach": "both"}, "detach must be one of 'near', 'far'; got 'both'"),
        ({"blocks": (0, 1)}, r"blocks must have one entry per horizon, 4; got \(0, 1\)"),
        ({"mlp_ratios": (4, 4, 0, 1)}, r"mlp_ratios\[2\] must be >= 1, got 0"),
        ({"attend": "inputs"}, 'blocks must be given with attend "inputs"'),
        ({"lag_gate": True, "conditioning": "frames"}, "lag_gate needs conditioning \"actions\", got 'frames'"),
        ({"output": "tokens"}, 'vocabulary must be above 0 for output "tokens" and 0 for others, got 0'),
        ({**TOKENS, "patch_sizes": (1, 1, 1, 1)}, 'patch_sizes must be None for output "tokens"'),
        ({**TOKENS, "consistency": ((0.0,) * 4,) * 4}, r"consistency of tokens must be \[K\]"),
        ({"shared_head": True}, "shared_head, bias and token_targets need output \"tokens\", got 'pixels'"),
        ({"surgery": True, "conditioning": "frames"}, "surgery need horizons that reach the hidden state on their own"),
        ({"surgery": True, "horizons": Horizons.next_frame()}, "need two horizons on one hidden state, got 1"),
        ({"upsampling": "analogy"}, "upsampling 'analogy' needs an upsampler, a number of channels; got None"),
        ({**TOKENS, "near_decoder": 8}, "near_decoder must be None for tokens, and with an upsampler"),
        (
            {"upsampler": 8, "horizons": Horizons((1, 1), (1, 2)), "near_decoder": 8},
            "near_decoder must be None for tokens, and with an upsampler",
        ),
        ({"near_decoder": 0}, "near_decoder must be >= 1, got 0"),
        ({"upsampler": 8}, "upsampler needs pixels or latents, and a horizon 0 of the offset of horizon 1"),
    ],
)
def test_heads_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadsConfig(**options)


def test_heads_want_what_their_options_read() -> None:
    hidden, video = torch.randn(1, 3, 2, 2, 32), torch.zeros(1, 3, 3, 8, 8)
    heads = MultiFrameHeads(32, 4, HeadsConfig(Horizons((1, 2), (1, 1)), conditioning="frames"))
    with pytest.raises(ValueError, match=r"inputs must be embeddings \[B, V, H, W, D\]"):
        heads(hidden, None, video)
    with pytest.raises(ValueError, match=r"inputs must have hidden's shape \[1, 3, 2, 2, 32\], or more frames"):
        heads(hidden, None, video, inputs=hidden[:, :2])
    with pytest.raises(ValueError, match='grad_monitor must be None with conditioning "frames"'):
        heads(hidden, None, video, inputs=hidden, grad_monitor=GradMonitor(2))
    with pytest.raises(ValueError, match='actions must be None with conditioning "frames"'):
        heads(hidden, torch.randn(1, 3, 32), video, inputs=hidden)
