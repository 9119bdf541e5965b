"""video_pyramid in CUDA C++, called by autograd.call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import raw
from ..op import Gradients, Want
from ..ops.video_pyramid import Arguments, gradient_of_video, output_shape
from . import launch


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    device = args.video.device
    patch_sizes: Sequence[int | None] = args.patch_sizes or [None] * len(args.factors)
    outputs = [
        torch.empty(output_shape(args.video, factor, patch), dtype=args.dtype, device=device)
        for factor, patch in zip(args.factors, patch_sizes, strict=True)
    ]
    launch(
        "cuda_video_pyramid", device,
        raw(args.video), args.factors, args.patch_sizes or [], args.scale, args.shift,
        [raw(output) for output in outputs],
    )  # fmt: skip
    return outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    return gradient_of_video(args, upstream)
