"""mfwm.losses against plain formulas in fp64: values, gradients, segments, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mfwm.losses import latent_consistency, temporal_contrast, temporal_difference
from torch import Tensor

from mfwm_kernels import HorizonLoss, Horizons, video_pyramid

# The second clip holds three episodes, the first of a single frame.
SEGMENTS = torch.tensor([[0] * 7, [5, 6, 6, 6, 7, 7, 7]])
HORIZONS = Horizons((1, 2, 4), (1, 2, 4))
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.01},
    torch.float16: {"rtol": 0.01, "atol": 2e-3},
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
segmented = pytest.mark.parametrize("segments", (None, SEGMENTS), ids=("one episode", "episodes"))


def in_one_episode(segments: Tensor | None, b: int, first: int, last: int) -> bool:
    return segments is None or bool((segments[b, first : last + 1] == segments[b, first]).all())


def agree(loss: HorizonLoss, inputs: list[Tensor], plain: Callable[[list[Tensor]], list[Tensor]], weights: Any) -> None:
    """Means, total and gradients are those of a formula in fp64, of inputs as they were rounded."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    means = plain(exact)
    total = sum(w * mean for w, mean in zip(weights, means, strict=True))
    options: dict[str, Any] = {**TOLERANCE[inputs[0].dtype], "check_dtype": False}
    torch.testing.assert_close(loss.per_horizon, torch.stack([mean.detach() for mean in means]), **options)
    torch.testing.assert_close(loss.total, total, **options)
    loss.total.backward()
    total.backward()  # type: ignore[union-attr]
    for x, reference in zip(inputs, exact, strict=True):
        assert (x.grad is None) == (not reference.requires_grad)
        if x.grad is not None and reference.grad is not None:
            assert reference.grad.abs().max() > 1e-3
            largest = reference.grad.abs().max()
            torch.testing.assert_close(x.grad.double() / largest, reference.grad / largest, **options)


@dtypes
@segmented
@pytest.mark.parametrize(("offset", "temperature"), ((1, 0.1), (2, 0.5)))
def test_contrast(dtype: torch.dtype, segments: Tensor | None, offset: int, temperature: float) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 7, 8).to(dtype).requires_grad_()

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        z = F.normalize(inputs[0], dim=-1)
        losses = []
        for b in range(2):
            for n in range(7 - offset):
                if segments is None or segments[b, n] == segments[b, n + offset]:
                    similar = {(c, m): z[b, n] @ z[c, m] / temperature for c in range(2) for m in range(7)}
                    positive = similar[b, n + offset]
                    del similar[b, n]
                    losses.append(torch.stack(list(similar.values())).logsumexp(0) - positive)
        return [torch.stack(losses).mean()]

    loss = temporal_contrast(states, offset=offset, temperature=temperature, segment_ids=segments)
    agree(loss, [states], plain, [1.0])
    pairs = (
        7 - offset if segments is None else sum(in_one_episode(segments, 1, n, n + offset) for n in range(7 - offset))
    )
    assert loss.counts.tolist() == [7 - offset + pairs]


def test_contrast_teaches_both_sides_of_a_pair() -> None:
    states = torch.randn(1, 5, 8, requires_grad=True)
    episodes = torch.tensor([[0, 0, 1, 2, 3]])
    temporal_contrast(states, segment_ids=episodes).total.backward()
    # One pair counts: its earlier side is the anchor, its later one the positive, and the others are negatives.
    assert (states.grad.norm(dim=-1) > 0).all()  # type: ignore[union-attr]


def test_the_accuracy_of_contrast_leaves_the_position_itself_out() -> None:
    """Neighbours on a line of growing steps: of two neighbours the earlier one is nearer, except at the start."""
    angles = torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0, 15.0]).deg2rad()
    states = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    loss = temporal_contrast(states)
    assert loss.accuracy is not None and loss.accuracy.tolist() == pytest.approx([1 / 5])
    backwards = temporal_contrast(states.flip(1))
    assert backwards.accuracy is not None and backwards.accuracy.tolist() == [1.0]
    # A pair that is alone in its direction: the loss falls to 0, which it could not with the position in its softmax.
    apart = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    assert temporal_contrast(apart, segment_ids=torch.tensor([[0, 0, 1]])).total < 1e-6


def test_weights_of_contrast_leave_positions_out() -> None:
    states = torch.randn(2, 6, 4)
    weights = torch.ones(2, 6)
    weights[0, 2] = weights[1, :4] = 0
    found = temporal_contrast(states, position_weights=weights)
    each = [
        temporal_contrast(states, position_weights=F.one_hot(torch.tensor(n), 12).float().view(2, 6)).total
        for n in (0, 1, 3, 4, 10)
    ]
    torch.testing.assert_close(found.total, torch.stack(each).mean())
    assert found.counts.tolist() == [5]


@dtypes
@segmented
def test_latent_consistency(dtype: torch.dtype, segments: Tensor | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 4, 8, 6).to(dtype).requires_grad_()
    states = [torch.randn(2, 7, 4 // f, 8 // f, 6).to(dtype).requires_grad_() for f in HORIZONS.factors]
    weights = [1.0, 0.5, 0.25]

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        means = []
        for state, k, f in zip(inputs, HORIZONS.offsets, HORIZONS.factors, strict=True):
            target = hidden.detach().double().unflatten(3, (8 // f, f)).unflatten(2, (4 // f, f)).mean((3, 5))
            each = [
                (state[b, n] - target[b, n + k]).square()
                for b in range(2)
                for n in range(7 - k)
                if segments is None or segments[b, n] == segments[b, n + k]
            ]
            means.append(torch.stack(each).mean())
        return means

    loss = latent_consistency(states, hidden, HORIZONS, horizon_weights=weights, segment_ids=segments)
    agree(loss, states, plain, weights)
    assert hidden.grad is None


@dtypes
@segmented
@pytest.mark.parametrize("layout", ("images", "patches", "residual patches", "uint8", "grid"))
def test_temporal_difference(dtype: torch.dtype, segments: Tensor | None, layout: str) -> None:
    """Against errors of every frame, from video_pyramid, whose pairs are picked one by one."""
    torch.manual_seed(0)
    shape = (2, 7, 3, 8, 16)
    video = torch.randint(256, shape, dtype=torch.uint8) if layout == "uint8" else torch.rand(shape) * 2 - 1
    patch_sizes = (2, 2, 1) if "patches" in layout else None
    frames = [x.double() for x in video_pyramid(video, HORIZONS.factors, patch_sizes=patch_sizes, dtype=torch.float64)]
    options: dict[str, Any] = {"residual": layout == "residual patches", "patch_sizes": patch_sizes}
    if layout == "grid":
        frames = [frame.flatten(3).mT for frame in frames]
        video, options["grid"] = video.flatten(3).mT, (8, 16)
    preds = [torch.randn_like(frame).to(dtype).requires_grad_() for frame in frames]
    weights = [1.0, 0.5, 0.25]

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        means = []
        for pred, frame, k in zip(inputs, frames, HORIZONS.offsets, strict=True):
            predicted = pred + frame if options["residual"] else pred
            error = predicted[:, : 7 - k] - frame[:, k:]
            each = [
                (error[b, n + 1] - error[b, n]).square()
                for b in range(2)
                for n in range(7 - k - 1)
                if in_one_episode(segments, b, n, n + k + 1)
            ]
            means.append(torch.stack(each).mean())
        return means

    loss = temporal_difference(
        preds, video, HORIZONS, horizon_weights=weights, segment_ids=segments, position_weights=None, **options
    )
    agree(loss, preds, plain, weights)
    for k, count, frame in zip(HORIZONS.offsets, loss.counts.tolist(), frames, strict=True):
        pairs = sum(in_one_episode(segments, b, n, n + k + 1) for b in range(2) for n in range(7 - k - 1))
        assert count == pairs * frame[0, 0].numel()


def test_differences_at_offset_zero_do_not_cross_a_border() -> None:
    """There every prediction counts for itself, and a pair still needs both in one episode."""
    preds, video, own = [torch.randn(1, 4, 3, 4, 4)], torch.randn(1, 4, 3, 4, 4), Horizons((0,), (1,))
    found = temporal_difference(preds, video, own, segment_ids=torch.tensor([[0, 0, 1, 1]]))
    parts = [temporal_difference([preds[0][:, n : n + 2]], video[:, n : n + 2], own).total for n in (0, 2)]
    torch.testing.assert_close(found.total, torch.stack(parts).mean())
    assert found.counts.tolist() == [2 * 48]


def test_a_steady_error_costs_no_difference_in_time() -> None:
    video = torch.rand(1, 6, 3, 4, 4)
    steady, flickering = video[:, 1:] + 0.5, video[:, 1:] + 0.5 * torch.tensor([1, -1, 1, -1, 1]).view(1, 5, 1, 1, 1)
    near = Horizons.next_frame()
    assert temporal_difference([steady], video, near).total < 1e-12
    assert temporal_difference([flickering], video, near).total == pytest.approx(1.0)


def test_weights_of_differences_concern_both_sides() -> None:
    preds, video, near = [torch.randn(1, 5, 3, 4, 4)], torch.randn(1, 6, 3, 4, 4), Horizons.next_frame()
    weights = torch.tensor([[2.0, 3.0, 0.0, 1.0, 1.0]])
    found = temporal_difference(preds, video, near, position_weights=weights)
    assert found.counts.tolist() == [2 * 48]
    parts = [temporal_difference([preds[0][:, n : n + 2]], video[:, n : n + 3], near).total for n in (0, 3)]
    torch.testing.assert_close(found.total, torch.stack(parts).mean())
    assert temporal_difference(preds, video, near, position_weights=weights[..., None]).total == found.total


@pytest.mark.parametrize("loss", ("contrast", "consistency", "difference"))
def test_a_clip_without_pairs_costs_nothing(loss: str) -> None:
    segments, x = torch.arange(3)[None], torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    far = Horizons((2,), (1,))
    found = {
        "contrast": lambda: temporal_contrast(x.mean((2, 3)), segment_ids=segments),
        "consistency": lambda: latent_consistency([x], x, far, segment_ids=segments),
        "difference": lambda: temporal_difference([x], x.detach(), Horizons.next_frame(), segment_ids=segments),
    }[loss]()
    found.total.backward()
    assert found.total == 0 and found.counts.tolist() == [0] and (x.grad == 0).all()


STATES, VIDEO, CHANGES = torch.zeros(1, 4, 8), torch.zeros(1, 4, 3, 4, 4), [torch.zeros(1, 4, 3, 4, 4)]
HIDDEN, TWO = torch.zeros(1, 4, 4, 4, 8), Horizons((1, 2), (1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temporal_contrast(STATES[0]), r"states must have 3 dimensions, \[B, T, D\]; got shape \[4, 8\]"),
        (lambda: temporal_contrast(STATES.long()), "states must have dtype float32, .*, got int64"),
        (lambda: temporal_contrast(STATES[:0]), r"states must not have size 0 in dimension 0, got shape \[0, 4, 8\]"),
        (lambda: temporal_contrast(STATES, offset=0), "offset must be >= 1, got 0"),
        (lambda: temporal_contrast(STATES, temperature=0.0), "temperature must be > 0, got 0.0"),
        (
            lambda: temporal_contrast(STATES, segment_ids=torch.zeros(1, 5, dtype=torch.int64)),
            r"segment_ids must have shape \[B, T_v\] = \[1, 4\], got \[1, 5\]",
        ),
        (lambda: latent_consistency([HIDDEN], HIDDEN, TWO), "states must have one entry per horizon, 2; got 1"),
        (lambda: latent_consistency([HIDDEN] * 2, HIDDEN[0], TWO), r"hidden must have 5 dimensions, \[B, T, H, W, D\]"),
        (
            lambda: latent_consistency([HIDDEN] * 2, HIDDEN, TWO),
            r"states\[1\] must have shape \[B, T, H / f, W / f, D\] = \[1, 4, 2, 2, 8\], got \[1, 4, 4, 4, 8\]",
        ),
        (
            lambda: latent_consistency([HIDDEN], HIDDEN, Horizons((2,), (3,))),
            r"factors\[0\] = 3 does not divide the grid 4 x 4 of hidden",
        ),
        (lambda: temporal_difference(CHANGES, VIDEO, TWO), "preds must have one entry per horizon, 2; got 1"),
        (
            lambda: temporal_difference(CHANGES, VIDEO[:, :3], Horizons.next_frame()),
            "preds must have T positions, 1 <= T <= V = 3, the frames of video; got 4",
        ),
        (
            lambda: temporal_difference(CHANGES, VIDEO, Horizons.next_frame(), segment_ids=torch.zeros(1, 3).long()),
            r"segment_ids must have shape \[B, V\] = \[1, 4\], got \[1, 3\]",
        ),
        (
            lambda: temporal_difference(CHANGES, VIDEO, Horizons.next_frame(), position_weights=torch.ones(1, 3)),
            r"position_weights must have shape .* got \[1, 3\]",
        ),
        (
            lambda: temporal_difference(CHANGES, VIDEO, Horizons.next_frame(), position_weights=-torch.ones(1, 4)),
            "position_weights must be finite and >= 0",
        ),
        (
            lambda: temporal_difference(
                CHANGES, VIDEO, Horizons.next_frame(), position_weights=torch.ones(1, 4, device="meta")
            ),
            "position_weights must be on the device of video, cpu; got meta",
        ),
        (lambda: temporal_difference(CHANGES, VIDEO, (1,)), "horizons must be a Horizons, got tuple"),  # type: ignore[arg-type]
        (lambda: latent_consistency([HIDDEN], HIDDEN, (1,)), "horizons must be a Horizons, got tuple"),  # type: ignore[arg-type]
        (
            lambda: temporal_contrast(torch.ones(1, 4, 8).half(), temperature=1e-6),
            "temperature must be > 3.1e-05 for float16, got 1e-06",
        ),
    ],
)
def test_arguments_are_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
