"""video_pyramid: box averages of a video at every factor, in one read.

out_i = avg_pool(scale * video + shift, factors[i]), as images or cut into patch tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..op import Backend, Cost, Gradients, Op, register

VIDEO = (torch.uint8, *check.FLOATING)


class Arguments(NamedTuple):
    video: Tensor
    factors: list[int]
    scale: float
    shift: float
    patch_sizes: list[int] | None
    dtype: torch.dtype


def video_pyramid(
    video: Tensor,
    factors: Sequence[int],
    *,
    scale: float | None = None,
    shift: float | None = None,
    patch_sizes: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The normalised video at 1/f of its size for each factor f, in one read.

    Equivalent to:

        x = (scale * video.float() + shift).flatten(0, 1)
        [F.avg_pool2d(x, f).unflatten(0, (B, T)).to(dtype) for f in factors]

    Computed in fp32 (fp64 if video or dtype is fp64).

    Args:
        video: [B, T, C, H, W], uint8 or floating, any strides (a THWC video is `video.permute(0, 1, 4, 2, 3)`).
        factors: integers >= 1; each divides H and W.
        scale, shift: by default 1/127.5 and -1 for uint8 (0..255 becomes -1..1), 1 and 0 for floating video.
        patch_sizes: one integer P per factor; if given, each output is in token layout [B, T, S, P * P * C] with
            S = H / (f P) * W / (f P), tokens in row-major order, features in (row, column, channel) order.
        dtype: of the outputs; by default fp32 for uint8, else the video's.

    Returns:
        A tensor [B, T, C, H / f, W / f] (or tokens) per factor. Differentiable with respect to a floating video.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """
    check.tensor("video", video, 5, "[B, T, C, H, W]", VIDEO)
    check.non_zero_sizes("video", video)
    factors = check.integers("factors", factors, least=1)
    if not factors:
        raise ValueError("factors must name at least one factor, got ()")
    patch_sizes = check_patch_sizes(patch_sizes, len(factors))
    check_divisible(video, factors, patch_sizes)
    scale, shift = check_normalisation(video, scale, shift)
    if dtype is None:
        dtype = torch.float32 if video.dtype == torch.uint8 else video.dtype
    elif dtype not in check.FLOATING:
        raise TypeError(f"dtype must be one of {check.names(check.FLOATING)}, got {dtype}")
    return tuple(call(OP, Arguments(video, list(factors), scale, shift, patch_sizes, dtype)))


def check_patch_sizes(patch_sizes: Sequence[int] | None, count: int) -> list[int] | None:
    return None if patch_sizes is None else list(check.integers("patch_sizes", patch_sizes, least=1, count=count))


def check_divisible(video: Tensor, factors: Sequence[int], patch_sizes: Sequence[int] | None) -> None:
    height, width = video.shape[3], video.shape[4]
    for i, factor in enumerate(factors):
        patch = 1 if patch_sizes is None else patch_sizes[i]
        if height % (factor * patch) or width % (factor * patch):
            cells = f"factors[{i}] = {factor}" + ("" if patch == 1 else f" times patch_sizes[{i}] = {patch}")
            raise ValueError(
                f"{cells} does not divide the frame {height} x {width} (video has shape {list(video.shape)}); "
                f"{check.common_divisors(height, width)} would"
            )


def check_normalisation(video: Tensor, scale: float | None, shift: float | None) -> tuple[float, float]:
    default_scale, default_shift = (1 / 127.5, -1.0) if video.dtype == torch.uint8 else (1.0, 0.0)
    return (
        default_scale if scale is None else check.number("scale", scale),
        default_shift if shift is None else check.number("shift", shift),
    )


def reference(args: Arguments) -> tuple[Tensor, ...]:
    frames = normalise(args.video, args.scale, args.shift, args.dtype)
    outputs = []
    for i, factor in enumerate(args.factors):
        image = box_average(frames, factor)
        outputs.append((image if args.patch_sizes is None else patchify(image, args.patch_sizes[i])).to(args.dtype))
    return tuple(outputs)


def normalise(video: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    """scale * video + shift in fp32, or in fp64 if video or dtype is fp64."""
    computed = torch.float64 if torch.float64 in (video.dtype, dtype) else torch.float32
    return video.to(computed) * scale + shift


def box_average(grid: Tensor, factor: int, axis: int = 3) -> Tensor:
    """Mean over factor x factor boxes of the axes `axis` and `axis + 1`: by default those of [B, T, C, H, W]."""
    if factor == 1:
        return grid
    height, width = grid.shape[axis : axis + 2]
    boxes = grid.unflatten(axis + 1, (width // factor, factor)).unflatten(axis, (height // factor, factor))
    return boxes.mean(dim=(axis + 1, axis + 3))


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, T, C, h, w] -> [B, T, S, P * P * C], features in (row, column, channel) order."""
    batch, time, channels, height, width = images.shape
    cut = images.reshape(batch, time, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)


def unpatchify(tokens: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of patchify: [B, T, S, P * P * C] -> [B, T, C, height, width]."""
    batch, time = tokens.shape[:2]
    cut = tokens.reshape(batch, time, height // patch, width // patch, patch, patch, channels)
    return cut.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, time, channels, height, width)


def gradient_of_video(args: Arguments, upstream: Sequence[Tensor | None]) -> Gradients:
    """The gradient of a floating video, for the backward of the CPU and CUDA C++.

    Plain PyTorch, because a video that requires grad (latents of an encoder in training) is rare, and this is only K
    broadcasts.
    """
    channels, height, width = args.video.shape[2:]
    computed = torch.promote_types(torch.promote_types(args.video.dtype, args.dtype), torch.float32)
    total = torch.zeros(args.video.shape, dtype=computed, device=args.video.device)
    for i, (factor, gradient) in enumerate(zip(args.factors, upstream, strict=True)):
        if gradient is None:
            continue
        if args.patch_sizes is not None:
            gradient = unpatchify(gradient, args.patch_sizes[i], channels, height // factor, width // factor)
        cells = total.unflatten(-1, (width // factor, factor)).unflatten(-3, (height // factor, factor))
        cells += (gradient.to(computed) * (args.scale / factor**2))[..., :, None, :, None]
    return {"video": total.to(args.video.dtype)}


def output_shape(video: Tensor, factor: int, patch: int | None) -> tuple[int, ...]:
    batch, time, channels, height, width = video.shape
    height, width = height // factor, width // factor
    if patch is None:
        return (batch, time, channels, height, width)
    return (batch, time, (height // patch) * (width // patch), patch * patch * channels)


def fake(args: Arguments) -> list[Tensor]:
    return [
        args.video.new_empty(
            output_shape(args.video, factor, None if args.patch_sizes is None else args.patch_sizes[i]),
            dtype=args.dtype,
        )
        for i, factor in enumerate(args.factors)
    ]


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def bytes_(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)

    yield {"video": bytes_(2, 3, 3, 16, 24), "factors": (1, 2, 4, 8), "dtype": dtype}
    yield {"video": bytes_(1, 2, 12, 18, 3).permute(0, 1, 4, 2, 3), "factors": (1, 3, 2), "patch_sizes": (2, 2, 3),
           "dtype": dtype}  # fmt: skip
    yield {"video": normal(2, 3, 1, 10, 6), "factors": (2, 1), "scale": 0.5, "shift": 0.25}
    yield {"video": normal(2, 2, 16, 8, 16)[..., ::2], "factors": (1, 4), "patch_sizes": (2, 2)}
    yield {"video": normal(0, 2, 3, 8, 8), "factors": (1, 2)}
    yield {"video": bytes_(2, 0, 3, 8, 8), "factors": (4,), "dtype": dtype}


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    # The token layout at the benchmarks' sizes.
    for size, patch in (("genie", 4), ("pixels", 8), ("latents", 2)):
        kwargs = OP.bench[size](dtype, device)
        yield {**kwargs, "patch_sizes": (patch,) * len(kwargs["factors"])}


def cost(kwargs: dict[str, Any]) -> Cost:
    video, factors = kwargs["video"], kwargs["factors"]
    out = kwargs.get("dtype") or (torch.float32 if video.dtype == torch.uint8 else video.dtype)
    written = sum(video.numel() // f**2 for f in factors)
    return Cost(video.numel() * video.element_size() + written * out.itemsize, (2 + len(factors)) * video.numel())


def _bench(batch: int, time: int, channels: int, size: int, factors: tuple[int, ...], latents: bool = False) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        shape = (batch, time, channels, size, size)
        video = torch.randn(shape, device=device).to(dtype) if latents else torch.randint(
            0, 256, shape, device=device, dtype=torch.uint8
        )  # fmt: skip
        return {"video": video, "factors": factors, "dtype": dtype}

    return make


OP = register(
    Op(
        name="video_pyramid",
        arguments=Arguments,
        differentiable=("video",),
        reference=reference,
        fake=fake,
        public=video_pyramid,
        samples=samples,
        variants=variants,
        cost=cost,
        bench={
            "cpu": _bench(8, 24, 3, 128, (1, 2, 4, 8)),
            "genie": _bench(36, 16, 3, 64, (1, 2, 4, 4)),
            "pixels": _bench(32, 24, 3, 256, (1, 2, 4, 8)),
            "latents": _bench(16, 32, 16, 32, (1, 2, 2, 2), latents=True),
        },
        backends={
            "cpu": Backend(kernels=("video_pyramid",), dtypes=VIDEO),
            "triton": Backend(
                kernels=("video_pyramid", "video_pyramid_backward"),
                dtypes=(torch.uint8, torch.float32, torch.bfloat16, torch.float16),
                refuses=lambda args: "it computes in fp32, dtype is float64" if args.dtype == torch.float64 else "",
            ),
            "cuda": Backend(kernels=("video_pyramid",), dtypes=VIDEO),
        },
    )
)
