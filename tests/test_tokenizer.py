"""Tokenizer and latent actions: what depends on what, and ids and codes that carry the frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mfwm.models.latent_actions import LatentActions, LatentActionsConfig
from mfwm.models.tokenizer import Tokenizer, TokenizerConfig
from torch import Tensor, nn

from mfwm_kernels import video_pyramid

SMALL: dict[str, Any] = {"frame": (3, 16, 16), "patch": 4, "width": 32, "head_width": 16}


def clip(frames: int = 6) -> Tensor:
    return torch.randint(0, 256, (2, frames, 3, 16, 16), dtype=torch.uint8)


def tokenizer(**options: Any) -> Tokenizer:
    return Tokenizer(TokenizerConfig(**{**SMALL, "levels": (5, 4, 3), **options}))


def latent_actions(**options: Any) -> LatentActions:
    model = LatentActions(LatentActionsConfig(**{**SMALL, "levels": (2, 2, 2), "context": 6, **options}))
    # Heads start at zero, and predict nothing that could leak.
    nn.init.normal_(model.decoder.heads.heads[0].weight, std=0.1)  # type: ignore[arg-type]
    return model


def changed_by_frame(give: Callable[[Tensor], Tensor], video: Tensor, frame: int) -> list[bool]:
    """Which positions of what `give` makes of a video change with one of its frames."""
    other = video.clone()
    other[:, frame] = 255 - other[:, frame]
    before, after = give(video), give(other)
    return [not torch.equal(a, b) for a, b in zip(before.unbind(1), after.unbind(1), strict=True)]


def test_ids_are_all_that_the_decoder_needs() -> None:
    model, video = tokenizer(), clip()
    # Frames so grey that none is clamped, and the loss is that of these frames.
    nn.init.normal_(model.heads.heads[0].weight, std=0.02)  # type: ignore[arg-type]
    ids = model.encode(video)
    assert ids.shape == (2, 6, 4, 4) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 60 and len(ids.unique()) > 10
    frames = model.decode(ids)
    assert frames.shape == video.shape and 0 < frames.abs().max() < 1
    (truth,) = video_pyramid(video, (1,))
    torch.testing.assert_close(model(video).total, (frames - truth).square().mean())


def test_print_shows_sizes() -> None:
    assert str(tokenizer(window=3)).splitlines()[1] == (
        "  frame=(3, 16, 16), patch=4, levels=(5, 4, 3), width=32, layers=2, head_width=16, window=3"
    )
    assert "levels=(2, 2, 2), width=32, layers=2, head_width=16, context=6" in str(latent_actions()).splitlines()[1]


def test_gradients_reach_the_encoder_through_the_ids() -> None:
    for model in (tokenizer(), latent_actions()):
        model(clip()).total.backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in model.encoder.parameters())


def test_tokens_are_causal_and_see_as_far_as_the_window() -> None:
    """One layer: the window itself. Blocks of random weights change with whatever they see, but ids are coarse."""
    model, video = tokenizer(layers=1, window=3, levels=(64, 64)), clip(8)
    assert changed_by_frame(model.encode, video, 2) == [n in (2, 3, 4) for n in range(8)]
    ids = torch.randint(0, 64, (2, 8, 4, 4))
    assert changed_by_frame(model.decode, ids, 2) == [n in (2, 3, 4) for n in range(8)]


def test_segments_are_tokenised_apart() -> None:
    model, video = tokenizer(), clip()
    segments = torch.tensor([0, 0, 1, 1, 1, 1]).expand(2, -1)
    ids = model.encode(video, segments)
    assert torch.equal(ids[:, :2], model.encode(video[:, :2])) and torch.equal(ids[:, 2:], model.encode(video[:, 2:]))
    assert not torch.equal(ids, model.encode(video))
    torch.testing.assert_close(model.decode(ids, segments)[:, 2:], model.decode(ids[:, 2:]))


def test_a_code_depends_on_the_next_frame_and_no_later_one() -> None:
    model, video = latent_actions(levels=(64, 64)), clip()
    codes = model.infer(video)
    assert codes.shape == (2, 6) and codes.dtype == torch.int64 and not codes[:, -1].any()
    assert changed_by_frame(model.infer, video, 3) == [n in (2, 3, 4) for n in range(6)]
    segments = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1)
    apart = torch.cat([model.infer(video[:, :3])[:, :2], model.infer(video[:, 3:])], dim=1)
    assert torch.equal(model.infer(video, segments)[:, [0, 1, 3, 4, 5]], apart)


def test_the_next_frame_is_told_by_its_code_alone() -> None:
    """Given the codes, predictions at n depend on frames <= n; given frames, on codes <= n."""
    model, video = latent_actions(), clip()
    codes = torch.randint(0, 8, (2, 6))
    assert changed_by_frame(lambda frames: model.predict(frames, codes), video, 3) == [n >= 3 for n in range(6)]
    other = codes.clone()
    other[:, 2] = (other[:, 2] + 1) % 8
    changed = (model.predict(video, codes) - model.predict(video, other)).abs().amax(dim=(0, 2, 3, 4)) > 0
    assert changed.tolist() == [n >= 2 for n in range(6)]
    # Heads at zero keep the last frame, and the loss is its error.
    nn.init.zeros_(model.decoder.heads.heads[0].weight)  # type: ignore[arg-type]
    (truth,) = video_pyramid(video, (1,))
    torch.testing.assert_close(model(video).total, (truth[:, 1:] - truth[:, :-1]).square().mean())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TokenizerConfig, {"patch": 5}, "patch = 5 does not divide the frame 16 x 16"),
        (TokenizerConfig, {"levels": (8, 1)}, r"levels must be one or more numbers >= 2, got \(8, 1\)"),
        (TokenizerConfig, {"head_width": 3}, "head_width must be even and divide width = 32, got 3"),
        (TokenizerConfig, {"window": 0}, "window must be >= 1, got 0"),
        (LatentActionsConfig, {"window": 1}, r"window must be >= 2 \(a frame and the next\), got 1"),
        (LatentActionsConfig, {"patch": 5}, "patch = 5 does not divide the frame 16 x 16"),
    ],
)
def test_configs_are_checked(make: Callable[..., object], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{**SMALL, **options})


def test_other_frames_and_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"video must be \[B, T, 3, 16, 16\], got \[2, 6, 3, 8, 16\]"):
        tokenizer().encode(clip()[..., :8, :])
    with pytest.raises(ValueError, match=r"ids must be \[B, T, 4, 4\], got \[2, 6, 4\]"):
        tokenizer().decode(torch.zeros(2, 6, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids must have dtype int32, int64, got float32"):
        tokenizer().decode(torch.zeros(2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"ids must be in 0..[0-9]+, got -1"):
        tokenizer().decode(torch.full((2, 6, 4, 4), -1))
