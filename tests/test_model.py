"""The model: causality, every option alive, the zero start, rollouts."""

from __future__ import annotations

from collections.abc import Callable
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
from small_model import HORIZONS, build, clip
from torch import Tensor, nn

from mfwm_kernels import GradMonitor, Horizons, video_pyramid

TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
MASKED: dict[str, Any] = {**TOKENS, "horizons": Horizons((0, 1, 3), (1, 2, 4)), "trunk": {"masked": True}}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2)},
    "narrow blocks": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2), "mlp_ratios": (4, 2, 1)},
    "blocks on inputs": {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2), "attend": "inputs"},
    "tap": {"tap": 1, "blocks": (0, 0, 1)},
    "gated": {"lag_gate": True},
    "no norm, equal start": {"norm": None, "residual": False},
    "consistency": {"consistency": (0.0, 0.3, 0.3), "detach": None, "weights": (1.0, 0.5, 0.25)},
    "consistency of any two": {"consistency": ((0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.0,) * 3), "detach": "far"},
    "uncertainty": {"weighting": "uncertainty"},
    "tokens, tokenised, uncertainty": {**TOKENS, "token_targets": "tokenised", "weighting": "uncertainty"},
    "balanced gradients": {"weighting": "gradients", "blocks": (0, 1, 1), "patch_sizes": (4, 4, 2)},
    "surgery": {"surgery": True},
    "surgery on balanced gradients": {"surgery": True, "weighting": "gradients", "tap": 1},
    "contrast": {"contrast": 0.5, "tap": 1},
    "latent consistency": {"latent_consistency": 0.3},
    "latent consistency of tokens": {**TOKENS, "latent_consistency": 0.3, "blocks": (0, 1, 1)},
    "latent consistency with frames": {"latent_consistency": 0.3, "conditioning": "frames"},
    "temporal difference": {"temporal_difference": 0.5},
    "latent": {"latent": 3},
    "latent, blocks on inputs, tap": {"latent": 3, "blocks": (0, 1, 1), "attend": "inputs", "tap": 1},
    "no actions": {"conditioning": "none"},
    "frames": {"conditioning": "frames", "blocks": (0, 1, 1), "patch_sizes": (4, 4, 2)},
    "frames, no blocks, tap": {"conditioning": "frames", "tap": 1},
    "all full size": {"horizons": Horizons((1, 2, 4), (1, 1, 1))},
    "far ones small": {"horizons": Horizons.low_res((1, 2, 4), 2)},
    "one offset at many sizes": {"horizons": Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,)})},
    "frames at many sizes": {
        "horizons": Horizons.multi_resolution({1: (1, 2, 4), 2: (2,), 4: (4,)}),
        "patch_sizes": (4, 4, 2, 4, 2),
        "conditioning": "frames",
    },
    "upsampler": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8},
    "analogy": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8, "upsampling": "analogy"},
    "upsampler, tap": {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 8, "tap": 1, "residual": False},
    "near decoder": {"near_decoder": 8},
    "near decoder, tap": {"near_decoder": 8, "output": "latents", "kind": ("gaussian", "mse", "mse"), "tap": 1},
    "near decoder, frames": {"near_decoder": 8, "conditioning": "frames", "residual": False},
    "latents": {"output": "latents"},
    "tokens": {**TOKENS, "consistency": (0.0, 0.1, 0.1)},
    "tokens, shared head": {**TOKENS, "shared_head": True, "blocks": (0, 1, 1)},
    "raster": {**TOKENS, "raster": 2, "blocks": (0, 1, 1)},
    "raster, three ids": {**TOKENS, "ids": 3, "raster": 1, "tap": 1},
    "tokens of three ids": {**TOKENS, "ids": 3, "blocks": (0, 1, 1), "attend": "inputs"},
    "tokens, tokenised": {**TOKENS, "token_targets": "tokenised"},
    "tokens, frames": {**TOKENS, "conditioning": "frames"},
    "masked": MASKED,
    "masked, blocks, tap": {**MASKED, "blocks": (1, 0, 1), "tap": 1},
}
options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def targets(model: WorldModel, clips: dict[str, Any]) -> dict[str, Any]:
    """The clips with what else the loss of the model needs."""
    if model.config.heads.token_targets == "pooled":
        return clips
    frames = clips["video"].shape[1]
    low = {f: torch.randint(0, 7, (2, frames, 8 // f, 8 // f)) for f in (2, 4)}
    return {**clips, "low_tokens": low}


def other(video: Tensor) -> Tensor:
    return 255 - video if video.dtype == torch.uint8 else -video if video.is_floating_point() else (video + 3) % 7


# By value for what gradients do not see, the upsampler on detached inputs and the frame that predict adds, and for each
# kind of input and of masked position.
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "upsampler",
        "upsampler, tap",
        "analogy",
        "near decoder",
        "latents",
        "tokens",
        "raster",
        "masked",
        "frames",
    ],
)
def test_causality(name: str) -> None:
    options = OPTIONS[name]
    model = build(**options).eval()
    clips, changed_at = clip(model=model), 3
    frames_ahead = model.config.heads.conditioning == "frames"
    offsets = model.config.heads.horizons.offsets
    before = model.predict(**clips)
    video = clips["video"].clone()
    video[:, changed_at] = other(video[:, changed_at])
    after = model.predict(**{**clips, "video": video})
    for offset, old, new in zip(offsets, before, after, strict=True):
        for n in range(6):
            sees = n >= changed_at or (frames_ahead and n + offset > changed_at)
            if n <= changed_at:
                assert torch.equal(old[:, n], new[:, n]) != sees, f"offset {offset}, position {n}"
    if model.action is None:
        return
    other_actions = clips["actions"].clone()
    other_actions[:, changed_at] = (other_actions[:, changed_at] + 1) % 5
    after = model.predict(**{**clips, "actions": other_actions})
    for offset, old, new in zip(offsets, before, after, strict=True):
        for n in range(6):
            sees = n + offset > changed_at
            assert torch.equal(old[:, n], new[:, n]) != sees, f"offset {offset}, position {n}"


def gradients(model: WorldModel, clips: dict[str, Any], of: Callable[[tuple[Tensor, ...]], Tensor]) -> list[Tensor]:
    """[B, V] norms of a prediction's gradients with respect to every frame, every action seen, every action to come."""
    made: dict[nn.Module, Tensor] = {}

    def leaf(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        made[module] = output.detach().requires_grad_()
        return made[module]

    watched = [part for part in (model.embed, model.action, model.window_action) if part is not None]
    hooks = [part.register_forward_hook(leaf) for part in watched]
    prediction = of(model.outputs(**clips))
    for hook in hooks:
        hook.remove()
    leaves = [made[part] for part in watched]
    found = torch.autograd.grad((prediction * torch.randn_like(prediction)).sum(), leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return [(torch.zeros_like(x) if g is None else g).flatten(2).norm(dim=-1) for x, g in pairs]


@options_of_all
def test_causality_by_gradient(options: dict[str, Any]) -> None:
    """Prediction k at n depends on frames <= n and actions < n + k; where real frames are given, on frames < n + k.

    That holds for k = 0 too: a masked frame is told from the actions before it.
    """
    model = build(**options)
    clips, heads = clip(9, model), model.config.heads
    for i, offset in enumerate(heads.horizons.offsets):
        if i < model.heads.first:
            continue  # the upsampler's inputs are detached: test_causality compares its values
        for n in (0, 2, 5):
            frames, *actions = gradients(model, clips, lambda outputs, i=i, n=n: outputs[i][:, n])  # type: ignore[misc]
            last = n + offset - 1 if heads.conditioning == "frames" else n
            assert (frames[:, : last + 1] > 0).all() and (frames[:, last + 1 :] == 0).all(), f"offset {offset}, {n}"
            # A masked position has not seen the action of its own frame.
            start = model.heads.window_start
            if actions:
                seen = torch.arange(actions[0].shape[1]) < last + start
                assert ((actions[0] > 0) == seen).all(), f"offset {offset}, position {n}"
            if len(actions) == 2:
                # Blocks on states read the windows of all positions <= n.
                on_states = heads.attend == "states" and len(model.heads.blocks[i]) > 0  # type: ignore[arg-type]
                first = start if on_states else n + start
                window = (torch.arange(9) >= first) & (torch.arange(9) < n + offset) & (offset > start)
                assert ((actions[1] > 0) == window).all(), f"offset {offset}, position {n}"


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": (0, 1, 1), "patch_sizes": (4, 4, 2)},
        {"blocks": (0, 1, 2), "patch_sizes": (4, 4, 2), "attend": "inputs"},
        {"conditioning": "frames"},
        TOKENS,
    ],
    ids=["blocks", "blocks on inputs", "frames", "tokens"],
)
def test_segments_do_not_mix(options: dict[str, Any]) -> None:
    """Nothing before an episode's first frame reaches its predictions, nor anything after its last."""
    model = build(**options).eval()
    clips = clip(model=model)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    before = model.predict(**clips, segment_ids=segments)
    for changed in (slice(0, 3), slice(3, 6)):
        video, actions = clips["video"].clone(), clips["actions"].clone()
        video[:, changed] = other(video[:, changed])
        actions[:, changed] = (actions[:, changed] + 1) % 5
        after = model.predict(video, actions, segments)
        kept = slice(3, 6) if changed.start == 0 else slice(0, 3)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, kept], new[:, kept]) and not torch.equal(old[:, changed], new[:, changed])


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


def test_a_window_is_what_a_layer_reaches() -> None:
    """Two layers: twice as far. Of the trunk, and of a horizon's blocks on top of it."""
    model = build(trunk={"positions": "rope", "window": 2}, blocks=(0, 0, 1))
    clips = clip(6, model)
    for i, reach in ((0, 2), (2, 3)):
        frames, *_ = gradients(model, clips, lambda outputs, i=i: outputs[i][:, 5])  # type: ignore[misc]
        assert ((frames > 0) == (torch.arange(6) >= 5 - reach)).all()
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    mask = time_mask(segments, 5, window=2)
    assert mask is not None and mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]
    ]  # fmt: skip


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
