"""How good pictures are: PSNR and SSIM, for pixels in -1..1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PEAK = 2.0


def psnr(squared_error: np.ndarray | float) -> Any:
    """dB, from a mean squared error."""
    return 10 * np.log10(PEAK**2 / np.maximum(squared_error, 1e-12))


def squared_error(pictures: Tensor, truth: Tensor) -> Tensor:
    """[clips] mean squared error."""
    return (pictures - truth).square().flatten(1).mean(1)


def similarity(pictures: Tensor, truth: Tensor) -> np.ndarray:
    """[clips, steps] structural similarity."""
    # Here, because training wants PSNR alone, and torchmetrics takes seconds to load.
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        pictures.flatten(0, 1), truth.flatten(0, 1), data_range=PEAK, reduction="none"
    )
    return torch.as_tensor(values).view(truth.shape[:2]).cpu().numpy()  # type: ignore[arg-type]
