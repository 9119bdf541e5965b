"""Tokens in raster order: what each may see, the joint likelihood, draws with a cache, and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, MultiFrameHeads, WorldModel, WorldModelConfig
from mfwm.data import Replay, ReplayWriter
from mfwm.evaluation.tokens import token_measures
from mfwm.models.raster import RasterDecoder
from mfwm.models.rollouts import rollout
from mfwm.training import TrainingConfig, for_replay, train
from mfwm.training.run_log import read_log
from small_model import build, clip
from torch import Tensor, nn

from mfwm_kernels import Horizons

TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
NEXT = Horizons.next_frame()


def decoder_of(ids: int = 1, blocks: int = 2) -> tuple[RasterDecoder, nn.Linear]:
    decoder, head = RasterDecoder(16, blocks, 8, 7, ids), nn.Linear(16, 7 * ids)
    for block in decoder.blocks:
        nn.init.normal_(block.down.weight, std=0.3)
    return decoder, head


@pytest.mark.parametrize("ids", [1, 3])
def test_a_token_is_given_the_tokens_before_it(ids: int) -> None:
    """And the states of the tokens up to its own."""
    decoder, _ = decoder_of(ids)
    states = torch.randn(1, 2, 2, 3, 16)
    tokens = torch.randint(0, 7, (1, 2, 2, 3, ids))
    before = decoder(states, tokens).flatten(2, 3)
    for s in range(6):
        changed, other = tokens.clone(), states.clone()
        changed[0, 1, s // 3, s % 3, -1] = (changed[0, 1, s // 3, s % 3, -1] + 1) % 7
        other[0, 1, s // 3, s % 3] += 1
        for after, first in ((decoder(states, changed), s + 1), (decoder(other, tokens), s)):
            differs = (after.flatten(2, 3) != before).any(-1)
            assert differs[0].tolist() == [[False] * 6, [False] * first + [True] * (6 - first)]


@pytest.mark.parametrize("ids", [1, 3])
def test_tokens_are_drawn_from_what_the_loss_gives_them(ids: int) -> None:
    """With the cache, from the same logits as in one pass over the frame that was drawn; also when sampled."""
    decoder, head = decoder_of(ids)
    states, generator = torch.randn(2, 3, 2, 3, 16), torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        drawn, logits = decoder.sample(states, head, temperature, generator=generator)
        assert drawn.shape == (2, 3, 2, 3, ids)
        expected = head(decoder(states, drawn)).unflatten(-1, (ids, 7))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(drawn, logits.argmax(-1)) == (temperature == 0)


@pytest.mark.parametrize("ids", [1, 2])
def test_the_loss_is_the_joint_likelihood(ids: int) -> None:
    """Of the next frame; far horizons are what they are without a decoder."""
    model = build(**TOKENS, raster=1, ids=ids)
    clips = clip(8, model)
    loss = model(**clips)
    outputs = model.outputs(**clips)
    assert model.heads.decoder is not None
    decoded = model.heads.decoder(outputs[0], clips["video"][:, 1:7])
    rows = model.heads._head(0)(decoded).unflatten(-1, (ids, 7))
    truth = clips["video"][:, 1:7].reshape(*rows.shape[:-1])
    expected = F.cross_entropy(rows.flatten(0, -2), truth.flatten()) * ids
    torch.testing.assert_close(loss.per_horizon[0], expected)
    torch.testing.assert_close(model.heads.logits(outputs, clips["video"])[0], rows if ids > 1 else rows.squeeze(-2))
    torch.testing.assert_close(model.heads.logits(outputs, clips["video"])[1].detach(), model.predict(**clips)[1])


def test_bits_are_the_joint_likelihood_and_hits_those_of_draws() -> None:
    model = build(**TOKENS, raster=1).eval()
    clips = {**clip(9, model), "segment_ids": torch.zeros(2, 9, dtype=torch.long)}
    measures = token_measures(model, clips, clips["actions"].roll(1, 0))
    bits = torch.from_numpy(measures["bits"])[:, 0].mean() * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(bits, model(**clips).per_horizon[0], check_dtype=False)
    drawn = model.predict(**{name: clips[name] for name in ("video", "actions")})[0].argmax(-1)
    assert measures["hits"][:, 0] == pytest.approx((drawn == clips["video"][:, 1:7]).float().mean((1, 2, 3)).numpy())


def test_rollouts_draw_in_raster_order() -> None:
    model = build(**TOKENS, raster=1).eval()
    clips = clip(12, model)
    video, actions = clips["video"][:, :4], clips["actions"]
    rolled = rollout(model, video, actions, 2)
    first = model.predict(video, actions[:, :4])[0][:, -1:].argmax(-1)
    assert torch.equal(rolled[:, :1], first)
    second = model.predict(torch.cat([video, first], dim=1), actions[:, :5])[0][:, -1:].argmax(-1)
    assert torch.equal(rolled[:, 1:], second)

    def sampled(seed: int, top_k: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rollout(model, video, actions, 2, temperature=1.0, top_k=top_k, generator=generator)

    assert torch.equal(sampled(0), sampled(0)) and not torch.equal(sampled(0), sampled(1))
    assert torch.equal(sampled(0, top_k=1), rolled)


def test_ignored_ids_are_neither_read_nor_predicted() -> None:
    config = HeadsConfig(NEXT, **TOKENS, raster=1, conditioning="none")
    heads, hidden = MultiFrameHeads(16, 1, config, head_width=8), torch.randn(1, 1, 2, 2, 16)
    nn.init.normal_(heads.decoder.blocks[0].down.weight)  # type: ignore[union-attr, index]
    video = torch.randint(0, 7, (1, 2, 2, 2))
    video[0, 1, 0, 1] = -100
    logits = heads.logits(heads.outputs(hidden, None, video), video)[0][0, 0].flatten(0, 1)
    truth = video[0, 1].flatten()
    loss = heads(hidden, None, video)
    torch.testing.assert_close(loss.per_horizon[0], F.cross_entropy(logits, truth, ignore_index=-100))
    video[0, 1, 0, 1] = 7
    with pytest.raises(ValueError, match="tokens must be in"):
        heads(hidden, None, video)


def test_tokens_in_one_dimension_are_drawn_in_rows() -> None:
    config = HeadsConfig(NEXT, **TOKENS, raster=1, conditioning="none")
    heads = MultiFrameHeads(16, 1, config, head_width=8)
    flat = MultiFrameHeads(16, 1, config, head_width=8, grid=(2, 3))
    flat.load_state_dict(heads.state_dict())
    hidden, video = torch.randn(2, 3, 2, 3, 16), torch.randint(0, 7, (2, 4, 2, 3))
    rows = (hidden.flatten(2, 3), None, video.flatten(2))
    assert torch.equal(flat(*rows).total, heads(hidden, None, video).total)
    assert torch.equal(flat.predict(*rows)[0], heads.predict(hidden, None, video)[0].flatten(2, 3))
    drawn = heads.draw_ids(heads.outputs(hidden, None, video))
    assert torch.equal(flat.draw_ids(flat.outputs(*rows)), drawn.flatten(2)) and drawn.shape == (2, 3, 2, 3)


@pytest.mark.parametrize("raster", [None, 1])
def test_raster_order_learns_what_tokens_have_in_common(raster: int | None) -> None:
    """A coin decides the frame, all of whose tokens are equal: 1 bit a frame, or 1 bit a token if independent."""
    config = HeadsConfig(NEXT, output="tokens", vocabulary=2, raster=raster, conditioning="none")
    heads, hidden = MultiFrameHeads(16, 1, config, head_width=8), torch.randn(32, 1, 2, 2, 16)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=2e-2)
    for _ in range(100):
        coins = torch.randint(0, 2, (32, 1, 1, 1)).expand(-1, 2, 2, 2)
        loss = heads(hidden, None, coins)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    outputs = heads.outputs(hidden, None, coins)
    drawn = heads.draw_ids(outputs, 1.0, generator=torch.Generator().manual_seed(0)).flatten(2)
    alike = (drawn == drawn[..., :1]).all(-1).float().mean()
    bits_of_frame = 4 * loss.per_horizon[0].item() / 0.6931
    assert (bits_of_frame < 1.3 and alike > 0.9) if raster else (bits_of_frame > 3.5 and alike < 0.5)


def test_a_run_in_raster_order_resumes(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path / "ids", 4, 4, actions=4, vocabulary=7)
    for _ in range(6):
        writer.append(torch.randint(0, 7, (20, 4, 4)).numpy(), torch.randint(0, 4, (20,)).numpy())
    heads = HeadsConfig(Horizons((1, 2), (1, 2)), **TOKENS, raster=1)
    model = WorldModelConfig((1, 4, 4), 1, 32, 1, 16, context=6, heads=heads)
    config = TrainingConfig(
        str(tmp_path / "ids"), steps=4, batch=2, clip=8, warmup=1, dtype="float32", checkpoint_every=2, look_every=4,
        held_out=0.2, tensorboard=False, rollout_loss=2, model=model,
    )  # fmt: skip
    config = for_replay(config, Replay(tmp_path / "ids"))
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=2)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "held_out" in read_log(tmp_path / "run" / "log.jsonl")[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raster": 0, **TOKENS}, "raster must be >= 1, got 0"),
        ({"raster": 1}, 'raster needs output "tokens", a near horizon of offset 1 or more and factor 1'),
        ({"raster": 1, **TOKENS, "horizons": Horizons((0, 1), (1, 1))}, "raster needs .* of offset 1 or more"),
        ({"raster": 1, **TOKENS, "horizons": Horizons((1,), (2,))}, "raster needs .* factor 1"),
        ({"raster": 1, **TOKENS, "horizons": NEXT, "consistency": (0.0,)}, "raster needs .* no consistency"),
    ],
)
def test_options_of_raster_order_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadsConfig(**options)


def test_sizes_and_heads_that_do_not_fit_are_refused() -> None:
    heads = HeadsConfig(NEXT, **TOKENS, raster=1)
    with pytest.raises(ValueError, match="head_width must be even and divide width = 16 with raster, got 3"):
        MultiFrameHeads(16, 1, heads, head_width=3)
    with pytest.raises(ValueError, match="near_head must be None with raster"):
        MultiFrameHeads(16, 1, heads, head_width=8, near_head=nn.Linear(16, 7, bias=False))
    with pytest.raises(ValueError, match="head_width must be even for rotary positions, got 5"):
        WorldModelConfig((1, 4, 4), 1, 15, 1, 5, heads=heads)
    pixels = WorldModel(WorldModelConfig((3, 8, 8), 4, 16, 1, 8, heads=replace(HeadsConfig(NEXT), patch_sizes=(4,))))
    with pytest.raises(ValueError, match='logits are of output "tokens", not of'):
        pixels.heads.logits((), torch.zeros(1))
    with pytest.raises(ValueError, match='draw_ids is for output "tokens", not for'):
        pixels.heads.draw_ids(())
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        build(**TOKENS, raster=1).heads.draw_ids((torch.zeros(1, 1, 8, 8, 32),), top_k=0)


def test_outputs_that_are_none_are_refused_by_name() -> None:
    heads = MultiFrameHeads(32, 8, HeadsConfig(Horizons.next_frame(), **TOKENS, raster=1), head_width=8)
    video = torch.randint(0, TOKENS["vocabulary"], (1, 3, 4, 4))
    outputs = heads.outputs(torch.randn(1, 3, 4, 4, 32), torch.randn(1, 3, 32), video)
    (near,) = outputs
    bad = ((), None, outputs * 2, [near[0]], [near.long()], [near[..., :5]], [near.to("meta")], [None])
    for wrong in bad:
        for call in (heads.draw_ids, lambda given: heads.logits(given, video)):
            with pytest.raises((ValueError, TypeError), match="outputs"):
                call(wrong)  # type: ignore[arg-type]
    for frames in (None, video[0], video.float(), video[:, :, :2], video.repeat(2, 1, 1, 1), video.to("meta")):
        with pytest.raises((ValueError, TypeError), match="video"):
            heads.logits(outputs, frames)  # type: ignore[arg-type]
