"""Rollouts: with a cache as without one, sampled actions, MaskGIT, jumps, drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.models.frame_decoder import FrameDecoder
from mfwm.models.maskgit import sample, sample_frame, training_mask
from mfwm.models.rollouts import Rollout, random_actions, rollout, rollout_in_jumps, rollout_with_drift
from mfwm.training.world_model import WorldModelLoss
from torch import Tensor, nn

from mfwm_kernels import Horizons, video_pyramid

HORIZONS = Horizons((1, 2, 4), (1, 2, 4))
MASKED = Horizons((0, 1, 3, 7), (1, 2, 4, 4))
TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
CONTEXT = 6


def build(ids: int = 1, trunk: dict[str, Any] | None = None, **options: Any) -> WorldModel:
    torch.manual_seed(0)
    heads = HeadsConfig(**{"horizons": HORIZONS, **options})
    tokens = heads.output == "tokens"
    actions = 0 if heads.conditioning == "none" else 5
    sizes: dict[str, Any] = {"actions": actions, "context": CONTEXT, **(trunk or {})}
    config = WorldModelConfig(
        (ids, 8, 8) if tokens else (3, 16, 16), 1 if tokens else 4, 32, 2, 16, heads=heads, **sizes
    )
    model = WorldModel(config)
    for head in model.heads.heads:
        last: Any = head.conv_out if isinstance(head, FrameDecoder) else head
        if isinstance(last, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(last.weight, std=1.0 if tokens else 0.05)
    return model.eval()


def masked_model(ids: int = 1, **options: Any) -> WorldModel:
    heads: dict[str, Any] = {"horizons": MASKED, **TOKENS, **options}
    return build(ids, {"masked": True}, **heads)


def begin(model: WorldModel, frames: int = 4, actions: int = 16) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    if model.tokens:
        video = torch.randint(0, 7, (2, frames, *model.frame_shape))
    else:
        video = torch.randint(0, 256, (2, frames, 3, 16, 16), dtype=torch.uint8)
    size = model.config.action_size
    taken = torch.randn(2, actions, size) if size else torch.randint(0, 5, (2, actions))
    return video, None if model.action is None else taken


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rope": ({"positions": "rope"}, {}),
    "tap": ({}, {"tap": 1}),
    "window": ({"positions": "rope", "window": 2}, {}),
    "window, near blocks": ({"positions": "rope", "window": 3}, {"blocks": (2, 0, 0), "tap": 1}),
    "near blocks": ({}, {"blocks": (1, 0, 0)}),
    "near blocks on inputs": ({}, {"blocks": (2, 0, 0), "attend": "inputs"}),
    "near blocks and tap": ({}, {"blocks": (1, 0, 1), "tap": 1}),
    "frames": ({}, {"conditioning": "frames", "blocks": (1, 0, 0)}),
    "no actions": ({}, {"conditioning": "none"}),
    "continuous actions": ({"actions": 0, "action_size": 2}, {"lag_gate": True}),
    "raster": ({}, {**TOKENS, "raster": 1}),
    "upsampler": ({}, {"horizons": Horizons((1, 1, 2), (1, 2, 2)), "upsampler": 4}),
    "near decoder": ({}, {"near_decoder": 4}),
    "tokens": ({}, TOKENS),
    "latents": ({}, {"output": "latents", "residual": False}),
}


@pytest.mark.parametrize("keep", [None, CONTEXT])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing(name: str, keep: int | None) -> None:
    """From half the context where it is full, or from as much of it as fits."""
    trunk, options = MODELS[name]
    if "window" in trunk and keep is not None:
        return
    model = build(trunk=trunk, **options)
    video, actions = begin(model)
    cached = rollout(model, video, actions, 9, keep=keep)
    torch.testing.assert_close(cached, rollout(model, video, actions, 9, keep=keep, cached=False), atol=1e-4, rtol=1e-4)
    assert not torch.equal(cached[:, -1], cached[:, 0])


@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": (2, 0, 0)}, {"blocks": (2, 0, 0), "attend": "inputs"}, {"horizons": MASKED, **TOKENS}],
    ids=["plain", "near blocks", "near blocks on inputs", "masked"],
)
def test_a_window_rolls_on_past_the_context(options: dict[str, Any]) -> None:
    """As a model does that sees all frames at once. A long beginning counts as far as the window reaches."""
    trunk = {"positions": "rope", "window": 3, "masked": "horizons" in options}
    model, whole = (build(trunk={**trunk, "context": context}, **options) for context in (CONTEXT, 40))
    video, actions = begin(model, frames=14, actions=34)
    assert actions is not None
    rolled = rollout(model, video, actions, 20, masked_steps=1)
    frames = torch.cat([video if model.tokens else video_pyramid(video, (1,))[0], rolled], dim=1)
    for step in (0, 1, 7, 19):
        seen = 14 + step
        if model.config.masked:
            unknown = torch.zeros(2, seen + 1, 8, 8, dtype=torch.bool)
            unknown[:, -1] = True
            states = whole.states(frames[:, : seen + 1], actions[:, : seen + 1], None, unknown)
            with torch.no_grad():
                logits = whole.heads.predict(video=frames[:, : seen + 1], near_only=True, **states)[0]
            assert torch.equal(rolled[:, step], logits[:, -1].argmax(-1))
        else:
            following = whole.predict(frames[:, :seen], actions[:, :seen], near_only=True)[0][:, -1]
            torch.testing.assert_close(rolled[:, step], following, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rolled, rollout(model, video, actions, 20, masked_steps=1, cached=False))
    with pytest.raises(ValueError, match="keep must be None for a model with a window, got 3"):
        rollout(model, video, actions, 2, keep=3)


@pytest.mark.parametrize(
    "options", [{"blocks": (1, 0, 0)}, {"horizons": MASKED, **TOKENS}], ids=["near blocks", "masked"]
)
def test_a_frame_depends_on_all_actions_before_it_and_on_no_other(options: dict[str, Any]) -> None:
    model = build(trunk={"masked": "output" in options}, **options)
    video, actions = begin(model)
    assert actions is not None
    rolled = rollout(model, video, actions, 6, masked_steps=3)
    for changed_at in (3, 5, 8):
        changed = actions.clone()
        changed[:, changed_at] = (changed[:, changed_at] + 1) % 5
        again = rollout(model, video, changed, 6, masked_steps=3)
        first = changed_at + 1 - 4
        assert torch.equal(again[:, :first], rolled[:, :first]) and not torch.equal(again[:, first], rolled[:, first])


def test_rollout_is_the_last_position_of_predict_fed_back() -> None:
    """From a window that starts anew with `keep` frames where the context is full."""
    model = build(blocks=(1, 0, 0))
    video, actions = begin(model)
    assert actions is not None
    (window,) = video_pyramid(video, (1,))
    end = 4
    for frame in rollout(model, video, actions, 9, keep=3).unbind(1):
        if window.shape[1] > CONTEXT:
            window = window[:, -3:]
        following = model.predict(window, actions[:, end - window.shape[1] : end], near_only=True)[0][:, -1]
        torch.testing.assert_close(frame, following)
        window, end = torch.cat([window, following[:, None]], dim=1), end + 1


@pytest.mark.parametrize("trunk", [{}, {"positions": "rope", "window": 3}], ids=["context", "window"])
def test_memory_stays_flat(trunk: dict[str, Any]) -> None:
    model = build(trunk=trunk, blocks=(1, 0, 0))
    video, actions = begin(model, actions=64)
    roller = Rollout(model, video, actions, 40)
    for _ in range(40):
        roller.step()
        memory = roller.memory
        assert memory.frames is not None and memory.frames.shape[1] <= CONTEXT
        assert memory.actions is not None and memory.actions.shape[1] <= CONTEXT
        assert all(x.shape[1] <= CONTEXT for x in memory.states.values())
        assert all(cache.keys is not None and cache.keys.shape[2] <= CONTEXT for cache in memory.caches)


def test_of_a_long_beginning_the_last_frames_are_seen() -> None:
    model = build()
    video, actions = begin(model, frames=10)
    assert actions is not None
    torch.testing.assert_close(
        rollout(model, video, actions, 4, keep=3), rollout(model, video[:, 4:], actions[:, 4:], 4, keep=3)
    )


def test_a_clip_of_a_batch_rolls_out_as_it_does_alone() -> None:
    model = build()
    video, actions = begin(model)
    assert actions is not None
    whole = rollout(model, video, actions, 5)
    for i in range(2):
        torch.testing.assert_close(whole[i : i + 1], rollout(model, video[i : i + 1], actions[i : i + 1], 5))


@pytest.mark.parametrize("trunk", [{}, {"actions": 0, "action_size": 2}], ids=["discrete", "continuous"])
def test_a_policy_gives_the_actions_that_are_missing(trunk: dict[str, Any]) -> None:
    """It sees the frames so far, and the rollout is that of the actions it gave."""
    model = build(trunk=trunk)
    video, actions = begin(model)
    assert actions is not None
    drawn, seen = [], []
    policy = random_actions(model, torch.Generator().manual_seed(0))

    def recorded(frames: Tensor) -> Tensor:
        seen.append(frames[:, -1])
        drawn.append(policy(frames))
        return drawn[-1]

    rolled = rollout(model, video, actions[:, :5], 4, policy=recorded)
    taken = torch.cat([actions[:, :5], torch.stack(drawn, dim=1)], dim=1)
    assert taken.shape[1] == 4 + 4 - 1
    torch.testing.assert_close(rolled, rollout(model, video, taken, 4))
    torch.testing.assert_close(torch.stack(seen, dim=1), rolled[:, 1:3])


def test_temperature_draws_tokens() -> None:
    model = build(**TOKENS)
    video, actions = begin(model)

    def rolled(temperature: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rollout(model, video, actions, 3, temperature=temperature, generator=generator)

    assert torch.equal(rolled(1.0, 0), rolled(1.0, 0)) and not torch.equal(rolled(1.0, 0), rolled(1.0, 1))
    assert torch.equal(rolled(0.0, 0), rolled(0.0, 1))
    logits = torch.tensor([0.0, 1.0, 3.0]).expand(20_000, 3)
    shares = sample(logits, 2.0, generator=torch.Generator().manual_seed(0)).bincount() / 20_000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)


def test_of_the_top_k_tokens_alone_some_are_drawn() -> None:
    logits = torch.tensor([0.0, 3.0, -1.0, 1.0]).expand(20_000, 4)
    shares = sample(logits, 2.0, 2, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.0, 1.5, 0.0, 0.5]).softmax(-1) * torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.02, rtol=0)
    for model in (build(**TOKENS), masked_model()):
        video, actions = begin(model)
        greedy = rollout(model, video, actions, 3, masked_steps=3)
        assert torch.equal(rollout(model, video, actions, 3, temperature=5.0, top_k=1, masked_steps=3), greedy)
        assert not torch.equal(rollout(model, video, actions, 3, temperature=5.0, top_k=3, masked_steps=3), greedy)
        with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
            rollout(model, video, actions, 3, temperature=1.0, top_k=0)


def test_training_mask_is_genies() -> None:
    """A share of each clip from 0.5..1, its own; the first frame whole."""
    torch.manual_seed(0)
    mask = training_mask(200, 5, (8, 8), "cpu")
    assert mask.shape == (200, 5, 8, 8) and not mask[:, 0].any()
    shares = mask[:, 1:].flatten(1).float().mean(1)
    assert 0.4 < shares.min() < 0.55 and 0.95 < shares.max() <= 1 and abs(shares.mean() - 0.75) < 0.03


def test_masked_tokens_are_not_seen_and_alone_count() -> None:
    model = masked_model()
    video, actions = begin(model, frames=6)
    token_mask = training_mask(2, 6, (8, 8), "cpu")
    other = torch.where(token_mask, (video + 1) % 7, video)
    outputs = [model.heads.outputs(video=ids, **model.states(ids, actions, None, token_mask)) for ids in (video, other)]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    loss = model(video, actions, token_mask=token_mask)
    assert loss.counts[0] == token_mask.sum() and (loss.counts[1:3] > 0).all()
    logits = model.heads.heads[0](outputs[0][0])[token_mask]
    expected = nn.functional.cross_entropy(logits, video[token_mask])
    torch.testing.assert_close(loss.per_horizon[0], expected, check_dtype=False)


def test_parts_of_a_masked_batch_make_the_gradient_of_the_batch() -> None:
    """Their shares count masked cells, of which each part has others."""
    model = build(trunk={"masked": True}, horizons=Horizons((0, 0, 1, 3), (1, 2, 2, 4)), **TOKENS)
    video, actions = begin(model, frames=8, actions=8)
    objective = WorldModelLoss(model)
    clips = {"video": video, "actions": actions, "segment_ids": torch.tensor([[0] * 8, [0] * 3 + [1] * 5])}
    clips |= objective.random_inputs(clips)
    clips["token_mask"][0, :, :4] = False

    def gradients(total: Tensor) -> Tensor:
        found = torch.autograd.grad(total, list(model.heads.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    total, figures = objective(clips)
    parts = [{name: value[i : i + 1] for name, value in clips.items()} for i in range(2)]
    counts = torch.stack([objective.counts(part) for part in parts])
    shares = 2 * counts / counts.sum(0).clamp_min(1)
    assert shares[0, 0, 0] < 0.8
    pairs = [objective(part, share) for part, share in zip(parts, shares, strict=True)]
    mean = torch.stack([part for part, _ in pairs]).mean()
    torch.testing.assert_close(mean, total)
    torch.testing.assert_close(
        torch.stack([named["per_horizon"] for _, named in pairs]).mean(0), figures["per_horizon"]
    )
    torch.testing.assert_close(gradients(mean), gradients(total))


def test_masked_positions_have_seen_the_action_before_theirs() -> None:
    """Position n: frames <= n, actions < n; horizon k with its window: actions < n + k; none across episodes."""
    model = masked_model()
    video, actions = begin(model, frames=6, actions=6)
    assert actions is not None
    changed = actions.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 5
    for segments in (None, torch.tensor([[0, 0, 0, 0, 1, 1]] * 2)):
        pairs = zip(model.predict(video, actions, segments), model.predict(video, changed, segments), strict=True)
        for offset, (a, b) in zip(MASKED.offsets, pairs, strict=True):
            for n in range(6):
                sees = n + offset > 3 if segments is None else n <= 3 and n + offset > 3
                assert torch.equal(a[:, n], b[:, n]) != sees, f"offset {offset}, position {n}"


@pytest.mark.parametrize("ids", [1, 2])
@pytest.mark.parametrize("options", [{}, {"tap": 1}, {"blocks": (1, 0, 0, 0)}], ids=str)
def test_masked_rollouts(ids: int, options: dict[str, Any]) -> None:
    """Cached as uncached; with one step, the most probable token of a wholly masked frame everywhere."""
    model = masked_model(ids, **options)
    video, actions = begin(model)
    rolled = rollout(model, video, actions, 6, masked_steps=3, keep=3)
    assert torch.equal(rolled, rollout(model, video, actions, 6, masked_steps=3, keep=3, cached=False))
    (once,) = rollout(model, video, actions, 1, masked_steps=1).unbind(1)
    frames = torch.cat([video, video[:, :1]], dim=1)
    token_mask = torch.zeros(2, 5, 8, 8, dtype=torch.bool)
    token_mask[:, 4] = True
    assert actions is not None
    with torch.no_grad():
        states = model.states(frames, actions[:, :5], None, token_mask)
        logits = model.heads.predict(video=frames, near_only=True, **states)[0][:, -1]
    assert torch.equal(once, logits.argmax(-1))


def test_maskgit_keeps_the_most_confident_tokens_first() -> None:
    """On a cosine: of 16 tokens 14, 11, 6 are masked again, then none; what is known is given back and stays."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, 1, 5)
    masks, known = [], []

    def logits_of(ids: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        known.append(ids)
        return logits

    drawn = sample_frame(logits_of, torch.zeros(2, 4, 4, 1, dtype=torch.int64), 4, 0.0)
    assert [int(mask[0].sum()) for mask in masks] == [16, 14, 11, 6]
    assert torch.equal(drawn, logits.argmax(-1))
    confidence = logits.log_softmax(-1).amax(-1)[..., 0]
    for mask, ids in zip(masks[1:], known[1:], strict=True):
        for b in range(2):
            assert confidence[b][~mask[b]].min() >= confidence[b][mask[b]].max()
        assert torch.equal(ids[~mask], drawn[~mask])


@pytest.mark.parametrize("options", [{"blocks": (0, 0, 1)}, TOKENS], ids=str)
def test_drift_compares_each_horizon_with_the_frame_that_came(options: dict[str, Any]) -> None:
    """The far ones' predictions of it, made 2 and 4 frames earlier; NaN where these lie before the rollout."""
    model = build(**options)
    video, actions = begin(model)
    assert actions is not None
    steps = 6
    frames, drift = rollout_with_drift(model, video, actions[:, : 4 + steps - 1], steps, keep=CONTEXT)
    torch.testing.assert_close(frames, rollout(model, video, actions, steps, keep=CONTEXT))
    whole = torch.cat([video if model.tokens else video_pyramid(video, (1,))[0], frames], dim=1)
    for step in range(steps):
        for i, (offset, factor) in enumerate(zip(HORIZONS.offsets, HORIZONS.factors, strict=True)):
            made_at = 4 + step - offset
            if made_at < 3:
                assert drift[:, step, i].isnan().all()
                continue
            start = max(0, made_at + 1 - CONTEXT)
            prediction = model.predict(whole[:, start : made_at + 1], actions[:, start : made_at + offset])[i][:, -1]
            came = whole[:, 4 + step]
            if model.tokens:
                cells = came.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3).flatten(3)
                covered = nn.functional.one_hot(cells, 7).float().mean(3)
                expected = -(covered * prediction.log_softmax(-1)).sum(-1).flatten(1).mean(1)
            else:
                (small,) = video_pyramid(came[:, None], (factor,))
                expected = (small[:, 0] - prediction).square().flatten(1).mean(1)
            torch.testing.assert_close(drift[:, step, i], expected, atol=1e-5, rtol=1e-4)
    assert (drift[:, -1, 1:] > 0).all() and (model.tokens or drift[:, :, 0].max() < 1e-9)


def test_jumps_take_one_horizon_after_the_other() -> None:
    """The trunk goes on from what the horizons up to that one predict of the frames in between."""
    model = build()
    video, actions = begin(model)
    assert actions is not None
    jumped = rollout_in_jumps(model, video, actions, 2, 2)
    assert jumped.shape == (2, 2, 3, 4, 4)
    one, two, four = (x[:, -1] for x in model.predict(video, actions[:, :7]))
    torch.testing.assert_close(jumped[:, 0], four)
    two, four = (nn.functional.interpolate(x, scale_factor=f) for x, f in ((two, 2), (four, 4)))
    filled = torch.stack([one, two, (two + four) / 2, four], dim=1)
    frames = torch.cat([video_pyramid(video, (1,))[0], filled], dim=1)[:, -CONTEXT:]
    again = model.predict(frames, actions[:, 2:11])[2][:, -1]
    torch.testing.assert_close(jumped[:, 1], again)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("upsampling", ["analogy", "correction"])
def test_jumps_at_low_resolution_are_enlarged(upsampling: Any, residual: bool) -> None:
    """From the last frame that was given, in every jump; the jumps themselves stay the same."""
    horizons = Horizons((2, 2, 4), (1, 2, 2))
    model = build(horizons=horizons, upsampler=4, upsampling=upsampling, residual=residual)
    assert model.heads.upsampler is not None
    nn.init.normal_(model.heads.upsampler.conv_out.weight, std=0.05)
    video, actions = begin(model)
    assert actions is not None
    video = 96 + video // 4  # Far enough from black and white that no prediction is clamped.
    small = rollout_in_jumps(model, video, actions, 3, 1)
    full = rollout_in_jumps(model, video, actions, 3, 1, full_size=True)
    (last,) = video_pyramid(video[:, -1:], (1,))
    for jump in range(3):
        expected = model.heads.upsampled(small[:, jump : jump + 1], last).clamp(-1, 1)
        torch.testing.assert_close(full[:, jump : jump + 1], expected)
    # The first jump is what horizons 0 and 1 predict.
    full_prediction, small_prediction, _ = (x[:, -1:] for x in model.predict(video, actions[:, :5]))
    torch.testing.assert_close(small[:, :1], small_prediction)
    torch.testing.assert_close(full[:, :1], full_prediction)
    for horizon in (0, 2):
        with pytest.raises(ValueError, match=r"full_size needs a model with an upsampler, and horizon 1, .* got hori"):
            rollout_in_jumps(model, video, actions, 1, horizon, full_size=True)
    with pytest.raises(ValueError, match=r"full_size needs a model with an upsampler, .* upsampler None"):
        rollout_in_jumps(build(), video, actions, 1, 1, full_size=True)


def test_what_cannot_be_rolled_out_is_refused() -> None:
    model = build()
    video, actions = begin(model)
    assert actions is not None
    with pytest.raises(ValueError, match=r"actions must cover frames 0\.\.8, got 5 of them"):
        rollout(model, video, actions[:, :5], 6)
    with pytest.raises(ValueError, match=r"keep must be in 1\.\.6 for a context of 6, got 7"):
        rollout(model, video, actions, 2, keep=7)
    with pytest.raises(ValueError, match="needs a near horizon of offset 1 and factor 1"):
        rollout(build(horizons=Horizons((2,), (1,))), video, actions, 2)
    with pytest.raises(ValueError, match="drift needs far horizons that forecast"):
        rollout_with_drift(build(conditioning="frames"), video, actions, 2)
    with pytest.raises(ValueError, match=r"horizon must be the index of an offset above 0 in .*, got 3"):
        rollout_in_jumps(model, video, actions, 2, 3)
    with pytest.raises(ValueError, match=r"actions must cover frames 0\.\.10, got 5"):
        rollout_in_jumps(model, video, actions[:, :5], 2, 2)
    with pytest.raises(ValueError, match='masked needs heads of output "tokens", of offset 0 first'):
        build(trunk={"masked": True})


@pytest.mark.parametrize(
    ("video", "actions", "steps", "message"),
    [
        ((2, 4, 3, 16, 16), torch.zeros(8, dtype=torch.long), 2, "actions must have 2 dimensions"),
        ((2, 4, 3, 16, 16), torch.zeros(1, 8, dtype=torch.long), 2, "actions must have as many clips as video, 2, got"),
        ((2, 4, 3, 16, 16), torch.zeros(2, 8), 2, "actions must have dtype"),
        ((2, 4, 3, 16, 16), torch.full((2, 8), 99), 2, "actions must be in 0.."),
        ((2, 4, 3, 16, 16), torch.zeros(2, 8, dtype=torch.long), 0, "steps must be"),
        ((2, 0, 3, 16, 16), torch.zeros(2, 8, dtype=torch.long), 2, "video must not have size 0"),
        ((4, 3, 16, 16), torch.zeros(2, 8, dtype=torch.long), 2, "video must have 5 dimensions"),
    ],
)
def test_malformed_calls_are_named(video: tuple[int, ...], actions: torch.Tensor, steps: int, message: str) -> None:
    model = WorldModel(WorldModelConfig(frame=(3, 16, 16), width=16, head_width=8, layers=1, context=4))
    with pytest.raises((ValueError, TypeError), match=message):
        rollout(model, torch.zeros(video, dtype=torch.uint8), actions, steps)
