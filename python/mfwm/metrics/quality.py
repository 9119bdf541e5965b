"""PSNR and SSIM of pictures with pixels in -1..1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PEAK = 2.0
SMALLEST = 6  # pixels: SSIM's window of 11 reaches five past an edge, where the frame is padded by reflection


def psnr(squared_error: np.ndarray | float) -> Any:
    """PSNR in dB, from a mean squared error."""
    return 10 * np.log10(PEAK**2 / np.maximum(squared_error, 1e-12))


def squared_error(pictures: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error, [clips]."""
    return (pictures - truth).square().flatten(1).mean(1)


def check_size(frame: Sequence[int]) -> None:
    """ValueError where frames (channels, height, width) are too small for SSIM."""
    _, height, width = frame
    if min(height, width) < SMALLEST:
        raise ValueError(f"frames must be at least {SMALLEST} x {SMALLEST} pixels for SSIM, got {height} x {width}")


def similarity(pictures: Tensor, truth: Tensor) -> np.ndarray:
    """SSIM [clips, steps] of pictures [clips, steps, C, height, width]."""
    check_size(truth.shape[2:])
    # Imported here, because training needs only PSNR and torchmetrics takes seconds to load.
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        pictures.flatten(0, 1), truth.flatten(0, 1), data_range=PEAK, reduction="none"
    )
    return torch.as_tensor(values).view(truth.shape[:2]).cpu().numpy()  # type: ignore[arg-type]
