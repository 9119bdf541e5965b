"""What a prediction depends on: frames and actions up to its position, the actions of its window, and no other clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mfwm import WorldModel
from mfwm.models.blocks import time_mask
from small_model import OPTIONS, TOKENS, build, clip
from torch import Tensor, nn

options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


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
