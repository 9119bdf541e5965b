"""Tests of multi_horizon_loss on the CPU alone: tiles, lanes, rows in place and non-temporal stores."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
from mfwm_kernels.backends import ABSENT

pytestmark = pytest.mark.skipif(bool(ABSENT["cpu"]), reason="no compiled module")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 2e-2}
CASCADE = Horizons((1, 2, 4), (1, 2, 4))
ALL_PAIRS = [[0, 0.5, 0.25], [0, 0, 1.5], [0, 0, 0]]


def inputs(
    batch: int, time: int, channels: int, height: int, width: int, horizons: Horizons, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    preds = [torch.randn(batch, time, channels, height // f, width // f).to(dtype) for f in horizons.factors]
    return preds, torch.randint(0, 256, (batch, time, channels, height, width), dtype=torch.uint8)


def gradients(backend: str, preds: list[Tensor], video: Tensor, horizons: Horizons, **options: Any) -> list[Tensor]:
    """The total, the losses, the consistency terms, then the gradients."""
    leaves = [pred.detach().requires_grad_() for pred in preds]
    with use_backend(backend):
        loss = multi_horizon_loss(leaves, video, horizons, **{"detach": None, **options})
        return [loss.total, loss.per_horizon, loss.consistency, *torch.autograd.grad(loss.total, leaves)]


def check(preds: list[Tensor], video: Tensor, horizons: Horizons, **options: Any) -> None:
    found = gradients("cpu", preds, video, horizons, **options)
    exact = gradients("reference", [pred.double() for pred in preds], video, horizons, **options)
    for k, (value, right) in enumerate(zip(found, exact, strict=True)):
        value, right = value.detach().double(), right.detach()
        error = float((value - right).norm() / right.norm().clamp_min(1e-12))
        assert error <= TOLERANCE[preds[0].dtype], f"value {k}: relative error {error:.1e}"


def check_needed_gradients(preds: list[Tensor], video: Tensor, horizons: Horizons, **options: Any) -> None:
    """Without gradients, and with that of one prediction alone, the same bits."""
    every = gradients("cpu", preds, video, horizons, **options)
    with use_backend("cpu"):
        assert torch.equal(multi_horizon_loss(preds, video, horizons, **options).total, every[0])
        for i in range(len(preds)):
            leaves = [pred.detach().requires_grad_(k == i) for k, pred in enumerate(preds)]
            multi_horizon_loss(leaves, video, horizons, **options).total.backward()
            assert [leaf.grad is not None for leaf in leaves] == [k == i for k in range(len(preds))]
            assert torch.equal(leaves[i].grad, every[3 + i])  # type: ignore[arg-type]


def check_threads(preds: list[Tensor], video: Tensor, horizons: Horizons, **options: Any) -> None:
    """Any number of threads gives the same bits."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients("cpu", preds, video, horizons, **options))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "charbonnier"])
@pytest.mark.parametrize("size", [(8, 4), (12, 36), (8, 68), (20, 132), (8, 2076)])
def test_widths_that_no_number_of_lanes_fills(size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """The widest frame has several tiles, of widths that no number of lanes fills either."""
    preds, video = inputs(2, 6, 1, *size, CASCADE, dtype)
    check(preds, video, CASCADE, kind=kind, consistency_weights=[0, 0.5, 0.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("detach", [None, "near", "far"])
@pytest.mark.parametrize(
    "horizons",
    [
        CASCADE,  # the second horizon is the far side of one pair and the near side of another
        Horizons((1, 2, 4), (1, 4, 4)),  # two pairs at the same level, a quarter of the size
        Horizons((1, 2, 4), (2, 2, 4)),  # a pair of equal sizes
        Horizons((0, 1, 1), (1, 3, 6)),
        Horizons((1, 2, 9), (1, 2, 4)),  # longer than the clip
    ],
)
def test_pairs(horizons: Horizons, detach: str | None, dtype: torch.dtype) -> None:
    preds, video = inputs(2, 6, 3, 24, 36, horizons, dtype)
    for residual in (False, True):
        check(preds, video, horizons, consistency_weights=ALL_PAIRS, detach=detach, residual=residual)
    check(preds, video, horizons, consistency_weights=[0, 0.5, 0.25], detach=detach)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strides(dtype: torch.dtype) -> None:
    preds, video = inputs(1, 6, 3, 16, 36, CASCADE, dtype)
    options: dict[str, Any] = {"consistency_weights": [0, 0.5, 0.25]}
    channels_last = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    check(preds, channels_last, CASCADE, **options)
    check([pred.transpose(-1, -2).contiguous().transpose(-1, -2) for pred in preds], video, CASCADE, **options)
    # Rows that are read in place, with gaps between them and not aligned to cache lines.
    check([torch.nn.functional.pad(pred, (3, 2))[..., 3:-2] for pred in preds], video, CASCADE, **options)
    check([pred[:, :1].expand_as(pred) for pred in preds], video, CASCADE, **options)
    check(preds, torch.nn.functional.pad(video, (3, 2, 1, 4))[..., 1:-4, 3:-2], CASCADE, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("patches", [(12, 8, 3), (4, 4, 4), (2, 1, 6)])
@pytest.mark.parametrize("channels", [3, 2, 4, 12])
def test_tokens_of_pixels(channels: int, patches: tuple[int, ...], dtype: torch.dtype) -> None:
    """A row of 12 pixels is one vector and a remainder; tiles have fewer rows than the frame, and cut tokens."""
    horizons = Horizons((1, 2, 4), (1, 2, 4))
    preds, video = tokens(channels, 144, 96, patches, horizons, dtype)
    options: dict[str, Any] = {"patch_sizes": patches, "consistency_weights": [0, 0.5, 0.25]}
    check(preds, video, horizons, residual=channels == 2, **options)
    check([pred.transpose(-1, -2).contiguous().transpose(-1, -2) for pred in preds], video, horizons, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [(8, 4, 2), (8, 2, 1)])
def test_tokens_in_frames_wider_than_a_tile(patches: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two tiles of 532 pixels, the second of which starts inside a token."""
    horizons = Horizons((1, 2, 4), (1, 2, 4))
    preds, video = tokens(12, 16, 1064, patches, horizons, dtype)
    check(preds, video, horizons, patch_sizes=patches, consistency_weights=[0, 0.5, 0.25])


def tokens(
    channels: int, height: int, width: int, patches: tuple[int, ...], horizons: Horizons, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    video = torch.randint(0, 256, (1, 6, channels, height, width), dtype=torch.uint8)
    sides = zip(horizons.factors, patches, strict=True)
    sizes = [(height // f // p * (width // f // p), p * p * channels) for f, p in sides]
    return [torch.randn(1, 6, *size).to(dtype) for size in sizes], video


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_latents(patch: int) -> None:
    horizons = Horizons((1, 2, 4), (1, 2, 2))
    _, pixels = inputs(2, 6, 16, 16, 16, horizons, torch.bfloat16)
    video = (pixels / 64).bfloat16()
    preds = [torch.randn(2, 6, (16 // f // patch) ** 2, patch * patch * 16).bfloat16() for f in horizons.factors]
    check(preds, video, horizons, patch_sizes=(patch,) * 3, consistency_weights=[0, 0.5, 0.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_larger_than_the_caches(dtype: torch.dtype) -> None:
    """Stores are non-temporal, except for the smallest gradient, whose rows of 33 are not aligned to 16 bytes."""
    horizons = Horizons.cascade(4)
    preds, video = inputs(1, 34, 3, 264, 264, horizons, dtype)
    assert sum(pred.numel() * pred.element_size() for pred in preds) > 16 << 20
    check(preds, video, horizons, consistency_weights=[0, 0.1, 0.1, 0.1], detach=None)


def test_only_the_needed_gradients() -> None:
    preds, video = inputs(2, 6, 3, 16, 24, CASCADE, torch.float32)
    check_needed_gradients(preds, video, CASCADE, consistency_weights=ALL_PAIRS, detach=None)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    preds, video = inputs(2, 6, 3, 64, 72, CASCADE, torch.float32)
    check_threads(preds, video, CASCADE, consistency_weights=ALL_PAIRS)


@pytest.mark.parametrize("residual", [False, True])
def test_nan_stays_nan_in_bf16(residual: bool) -> None:
    """For any bits of the NaN: rounded like a number, a NaN whose bits are all 1 would become 0."""
    horizons = Horizons.next_frame()
    for bits in (0x7FFFFFFF, -1, 0x7FC00000):
        video = torch.randn(1, 2, 1, 2, 40)
        video[0, 0 if residual else 1, 0, 1, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        pred = torch.randn(1, 2, 1, 2, 40).bfloat16().requires_grad_()
        with use_backend("cpu"):
            loss = multi_horizon_loss([pred], video, horizons, scale=1.0, shift=0.0, residual=residual)
        (gradient,) = torch.autograd.grad(loss.total, [pred])
        assert gradient.isnan().sum() == 1 and gradient[0, 0, 0, 1, 3].isnan()


MEMORY = """
import resource, sys, torch
from mfwm_kernels import Horizons, multi_horizon_loss, use_backend
torch.set_num_threads(2)
horizons, (batch, frames, side) = Horizons.cascade(4), map(int, sys.argv[1:])

def step(batch, frames, side):
    video = torch.ones(batch, frames, 3, side, side, dtype=torch.uint8)
    preds = [torch.ones(batch, frames, 3, side // f, side // f) for f in horizons.factors]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with use_backend("cpu"):
        multi_horizon_loss(preds, video, horizons, consistency_weights=[0, 0.1, 0.1, 0.1], detach=None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

step(1, 8, 16)  # threads and libraries
print(step(batch, frames, side))
"""


def test_memory_beside_inputs_and_gradients_is_that_of_a_tile() -> None:
    """Under 1 MiB per thread, even for a video of 100 MB, whose stored pyramid alone would need 500 MB."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, "4", "16", "720"], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 2 * 1024
