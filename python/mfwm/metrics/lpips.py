"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on AlexNet, with weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# AlexNet's convolutions: (in, out, kernel, stride, padding, index in torchvision's `features`).
CONVOLUTIONS = (
    (3, 64, 11, 4, 2, 0),
    (64, 192, 5, 1, 2, 3),
    (192, 384, 3, 1, 1, 6),
    (384, 256, 3, 1, 1, 8),
    (256, 256, 3, 1, 1, 10),
)
POOLED = (1, 2)  # convolutions with max pooling before them
SMALLEST = 31  # pixels; smaller pictures leave nothing to convolve


class LPIPS(nn.Module):
    """Perceptual distance of pictures: weighted squared differences of AlexNet's normalised features."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path) -> None:
        """weights: the state dict of `lpips.LPIPS(net="alex")`, by torch.save. ValueError if it is anything else."""
        super().__init__()
        state = state_of(weights)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel, stride, padding)
            for inputs, outputs, kernel, stride, padding, _ in CONVOLUTIONS
        )
        self.scores = nn.ModuleList(nn.Conv2d(outputs, 1, 1, bias=False) for _, outputs, *_ in CONVOLUTIONS)
        names = {}
        for i, (*_, index) in enumerate(CONVOLUTIONS):
            names[f"scores.{i}.weight"] = f"lin{i}.model.1.weight"
            names |= {f"convolutions.{i}.{part}": f"net.slice{i + 1}.{index}.{part}" for part in ("weight", "bias")}
        expected, rule = self.state_dict(), f"{weights} must be the state dict of lpips.LPIPS(net='alex')"
        if missing := [name for name in names.values() if name not in state]:
            raise ValueError(f"{rule}; it lacks {', '.join(missing)}")
        for own, name in names.items():
            if not isinstance(state[name], Tensor) or state[name].shape != expected[own].shape:
                got = list(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
                raise ValueError(f"{rule}; {name} must be {list(expected[own].shape)}, got {got}")
        self.load_state_dict({own: state[name] for own, name in names.items()})
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N]: the distances of pictures [N, 3, H, W] in [-1, 1]."""
        if a.shape[1] != 3 or min(a.shape[2:]) < SMALLEST:
            raise ValueError(f"LPIPS needs pictures [N, 3, >= {SMALLEST}, >= {SMALLEST}], got {list(a.shape)}")
        distance = a.new_zeros(len(a))
        for i, score in enumerate(self.scores):
            a, b = (self._layer(i, x) for x in (a, b))
            distance = distance + score((unit(a) - unit(b)).square()).mean(dim=(1, 2, 3))
        return distance

    def _layer(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            x = (x - self.shift) / self.scale
        if i in POOLED:
            x = F.max_pool2d(x, 3, 2)
        return F.relu(self.convolutions[i](x))


def state_of(path: Path) -> dict[str, Any]:
    """Tensors by name, from a file that torch.save wrote, read without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # A damaged file raises almost anything.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} must be a file of tensors by torch.save: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    return state


def unit(features: Tensor) -> Tensor:
    """Features scaled to length 1 over the channels."""
    return features / (1e-8 + features.square().sum(1, keepdim=True)).sqrt()
