"""The kernels on strips (csrc/cuda/strips.cuh) in the emulator: every strip, layout and dtype, values and gradients.

A build without the kernels for the other calls computes nothing where the strips do not serve, which the tests notice:
memory is NaN until a kernel writes it.
"""

from __future__ import annotations

import random
import shutil
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulator import ROOT, emulated_module
from test_cuda_emulated import check_sample
from torch import Tensor

import mfwm_kernels.cuda.multi_horizon_loss as loss_launcher
from mfwm_kernels import Horizons
from mfwm_kernels.op import OPS
from mfwm_kernels.ops.video_pyramid import output_shape

LOSS, PYRAMID = OPS["multi_horizon_loss"], OPS["video_pyramid"]
# name: factors, and per layout the channels, the patch sizes (None: images) and what height and width are multiples of
CASCADE, SHORT = (1, 2, 4, 8), (1, 2, 4, 4)
LAYOUTS = {
    "tokens of 8": (CASCADE, 3, (8, 8, 8, 8), 64),
    "tokens of 8 to 1": (CASCADE, 3, (8, 4, 2, 1), 8),
    "tokens of 16": (SHORT, 3, (16, 8, 8, 4), 32),
    "tokens of 4": (SHORT, 3, (4, 4, 4, 4), 16),
    "tokens of 4 to 1": (SHORT, 3, (4, 2, 1, 1), 4),
    "tokens of 2, channels": ((1, 2, 2, 2), 16, (2, 2, 2, 2), 4),
    "tokens of 1, channels": (CASCADE, 8, (1, 1, 1, 1), 8),
    "features": (SHORT, 24, "grid", 4),
    "images": (CASCADE, 1, None, 8),
    "images of 5 channels": (SHORT, 5, None, 8),
    "images, 3 channels side by side": (SHORT, 3, "side by side", 8),
    "tokens of 8, 1 channel": (CASCADE, 1, (8, 8, 4, 4), 32),
}


@pytest.fixture(scope="module")
def only_strips(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A module in which only the kernels on strips compute anything."""
    sources = tmp_path_factory.mktemp("strips") / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"))
    for place, right, wrong in (
        ("multi_horizon_loss.cu", "{run_strips, run_patches, run_gather}", "{run_strips}"),
        ("video_pyramid.cu", "if (run_pyramid_strips(op, static_cast<cudaStream_t>(stream))) return;",
         "if (run_pyramid_strips(op, static_cast<cudaStream_t>(stream)) || true) return;"),
    ):  # fmt: skip
        file = sources / "cuda" / place
        text = file.read_text()
        assert text.count(right) == 1
        file.write_text(text.replace(right, wrong))
    return emulated_module(sources)


def frames_like(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype, side_by_side: bool) -> Tensor:
    if dtype == torch.uint8:
        values = torch.randint(0, 256, shape, dtype=dtype)
    else:
        values = torch.randn(shape).to(dtype)
    return values.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if side_by_side else values


def loss_call(layout: str, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """A call that the strips serve, with random options."""
    draw = random.Random(f"{layout} {seed}")
    torch.manual_seed(seed)
    factors, channels, patches, step = LAYOUTS[layout]
    count = draw.choice([1, 2, 3, 4, 4])
    factors, offsets = factors[:count], tuple(sorted(draw.sample([0, 1, 2, 3, 5], count)))
    most = max(1, 40 // step)
    height, width = step * draw.randint(1, most), step * draw.randint(1, most)
    frames = draw.choice([2, 5, 7])
    positions = draw.choice([frames, max(1, frames - 1)])
    video_dtype = draw.choice([torch.uint8, torch.uint8, torch.float32, torch.bfloat16, torch.float16])
    shape = (draw.randint(1, 2), frames, channels, height, width)
    side_by_side = channels in (3, 8, 16, 24) and (draw.random() < 0.4 or patches == "grid")
    video = frames_like(draw, shape, video_dtype, side_by_side)
    sizes = patches[:count] if isinstance(patches, tuple) else None
    preds = []
    for i, factor in enumerate(factors):
        batch, _, *rest = output_shape(video, factor, sizes and sizes[i])
        pred = frames_like(draw, (batch, positions, *rest), dtype, len(rest) == 3 and isinstance(patches, str))
        preds.append(pred.permute(0, 1, 3, 4, 2).flatten(2, 3) if patches == "grid" else pred)
    call: dict[str, Any] = {
        "preds": preds, "video": video, "horizons": Horizons(offsets, factors), "delta": 0.6, "eps": 0.05,
        "kind": draw.choice(["mse", "mse", "l1", "huber", "charbonnier"]), "residual": draw.random() < 0.4,
        "detach": draw.choice([None, "near", "far"]), "horizon_weights": torch.rand(count),
    }  # fmt: skip
    if sizes is not None:
        call["patch_sizes"] = sizes
    if patches == "grid":
        call["video"], call["grid"] = video.permute(0, 1, 3, 4, 2).flatten(2, 3), (height, width)
    if draw.random() < 0.7:
        call["consistency_weights"] = torch.rand(count)
    if draw.random() < 0.4:
        call["segment_ids"] = torch.randint(0, 2, shape[:2])
    if draw.random() < 0.3:
        weights = torch.rand(shape[0], positions, *draw.choice([(), (count,)]))
        call["position_weights"] = weights * (torch.rand(weights.shape) > 0.3)
    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_on_strips(
    layout: str, dtype: torch.dtype, only_strips: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        # Few blocks go over several tiles each.
        monkeypatch.setattr(loss_launcher, "BLOCKS", (1, 3, 396)[seed % 3])
        check_sample(LOSS, loss_call(layout, seed, dtype), dtype, "start", only_strips)


@pytest.mark.parametrize("edge", ["end", "unaligned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_of_tensors_that_may_not_be_aligned(layout: str, edge: str) -> None:
    for seed in range(3):
        check_sample(LOSS, loss_call(layout, seed + 10, torch.bfloat16), torch.bfloat16, edge)


def pyramid_call(layout: str, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    draw = random.Random(f"{layout} {seed}")
    torch.manual_seed(seed)
    factors, channels, patches, step = LAYOUTS[layout]
    most = max(1, 40 // step)
    shape = (
        draw.randint(1, 2),
        draw.randint(1, 3),
        channels,
        step * draw.randint(1, most),
        step * draw.randint(1, most),
    )
    video_dtype = draw.choice([torch.uint8, torch.uint8, torch.float32, torch.bfloat16, torch.float16])
    video = frames_like(draw, shape, video_dtype, channels in (3, 8, 16) and draw.random() < 0.4)
    chosen = draw.sample(range(len(factors)), draw.randint(1, len(factors)))
    call = {"video": video, "factors": [factors[i] for i in chosen], "scale": 0.7, "shift": -0.2, "dtype": dtype}
    return {**call, "patch_sizes": [patches[i] for i in chosen]} if isinstance(patches, tuple) else call


def precision(call: dict[str, Any]) -> torch.dtype:
    """The coarser dtype of the outputs and of the video's gradient."""
    return call["video"].dtype if call["video"].dtype in (torch.bfloat16, torch.float16) else call["dtype"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("layout", [name for name, entry in LAYOUTS.items() if not isinstance(entry[2], str)])
def test_the_pyramid_on_strips(layout: str, dtype: torch.dtype, only_strips: ModuleType) -> None:
    for seed in range(5):
        call = pyramid_call(layout, seed, dtype)
        check_sample(PYRAMID, call, precision(call), "start", only_strips)


@pytest.mark.parametrize("edge", ["end", "unaligned"])
@pytest.mark.parametrize("layout", [name for name, entry in LAYOUTS.items() if not isinstance(entry[2], str)])
def test_the_pyramid_of_tensors_that_may_not_be_aligned(layout: str, edge: str) -> None:
    for seed in range(2):
        check_sample(PYRAMID, pyramid_call(layout, seed + 10, torch.bfloat16), torch.bfloat16, edge)
