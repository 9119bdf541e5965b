"""video_pyramid on the CPU alone: split tiles, the output stored while frames are loaded, and non-temporal stores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfwm_kernels import use_backend, video_pyramid


def check(video: Tensor, factors: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    with use_backend("cpu"):
        found = video_pyramid(video, factors, dtype=dtype)
    with use_backend("reference"):
        want = video_pyramid(video, factors, dtype=torch.float32)
    for result, expected in zip(found, want, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    return list(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(32, 16), (32, 48), (24, 8), (16, 40)], ids=str)
@pytest.mark.parametrize("factors", [(1, 2, 4, 8), (2, 4), (1,), (8, 1, 1), (4,)], ids=str)
def test_rows_of_whole_and_of_broken_blocks(
    size: tuple[int, int], factors: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A split tile has blocks of 16 pixels, and its coarser levels may end within one."""
    check(torch.randint(0, 256, (2, 3, 3, *size), dtype=torch.uint8), factors, dtype)
    check(torch.randn(2, 3, 3, *size).to(dtype), factors, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [256, 264], ids=["aligned", "rows of 33 at an eighth"])
def test_outputs_larger_than_the_caches(width: int, dtype: torch.dtype) -> None:
    """Stores bypass the caches, except into outputs whose rows do not begin at 16 bytes."""
    check(torch.randint(0, 256, (1, 52, 3, 256, width), dtype=torch.uint8), (1, 2, 4, 8), dtype)


def test_every_nan_stays_one() -> None:
    """Rounding would carry through a NaN with all bits set and leave a number."""
    video = torch.randn(1, 2, 3, 16, 32)
    video[0, 1, 2, 3, 5:7] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for source in (video, video.bfloat16()):
        with use_backend("cpu"):
            full, half = video_pyramid(source, (1, 2), dtype=torch.bfloat16)
        assert torch.equal(full.isnan(), video.isnan()) and half.isnan().sum() == 2
