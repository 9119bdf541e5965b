"""The same work as plain PyTorch would do it, for eager and torch.compile, and as other libraries do it.

A formula takes the keyword arguments of an op's benchmark call and returns the tensors that gradients flow from. It is
written as an experienced user would write it, and computes what the op computes at the benchmark sizes: every clip one
episode, no options besides those that the sizes use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]


def action_window_sum(actions: Tensor, offsets: tuple[int, ...]) -> Outputs:
    return (torch.stack([_window(actions, offset) for offset in offsets], dim=2),)


def _window(actions: Tensor, offset: int) -> Tensor:
    """The sum of the actions n + 1 .. n + offset - 1, in fp32."""
    total = torch.zeros_like(actions, dtype=torch.float32)
    for lag in range(1, min(offset, actions.shape[1])):
        total = total + F.pad(actions[:, lag:], (0, 0, 0, lag)).float()
    return total.to(actions.dtype)


def fan_out(hidden: Tensor, actions: Tensor, horizons: Any, norm_weight: Tensor, pool: tuple[int, ...]) -> Outputs:
    states = []
    for offset, p in zip(horizons.offsets, pool, strict=True):
        cells = hidden
        if p > 1:
            height, width = hidden.shape[2:4]
            cells = hidden.unflatten(3, (width // p, p)).unflatten(2, (height // p, p)).mean((3, 5))
        state = cells + _window(actions, offset)[:, :, None, None]
        states.append(F.rms_norm(state, (state.shape[-1],), norm_weight, 1e-6))
    return tuple(states)


def multi_horizon_linear(
    hidden: Tensor, actions: Tensor, weights: list[Tensor], horizons: Any, norm_weight: Tensor
) -> Outputs:
    outputs = []
    for offset, weight in zip(horizons.offsets, weights, strict=True):
        state = hidden + _window(actions, offset)[:, :, None, None]
        outputs.append(F.linear(F.rms_norm(state, (state.shape[-1],), norm_weight, 1e-6), weight))
    return tuple(outputs)


def mtp_combine(
    hidden: Tensor, embedding: Tensor, weight: Tensor, hidden_norm_weight: Tensor, embedding_norm_weight: Tensor
) -> Outputs:
    normed_hidden = F.rms_norm(hidden, (hidden.shape[-1],), hidden_norm_weight, 1e-6)
    normed_embedding = F.rms_norm(embedding, (embedding.shape[-1],), embedding_norm_weight, 1e-6)
    return (F.linear(torch.cat([normed_hidden, normed_embedding], dim=-1), weight),)


def _frames(video: Tensor) -> Tensor:
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video.float()


def _shrunk(images: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return images
    return F.avg_pool2d(images.flatten(0, 1), factor).unflatten(0, images.shape[:2])


def _patches(images: Tensor, patch: int) -> Tensor:
    batch, time, channels, height, width = images.shape
    cut = images.reshape(batch, time, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)


def _image(tokens: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    cut = tokens.unflatten(2, (height // patch, width // patch)).unflatten(4, (patch, patch, channels))
    return cut.permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)


def video_pyramid(video: Tensor, factors: tuple[int, ...], dtype: torch.dtype) -> Outputs:
    frames = _frames(video)
    return tuple(_shrunk(frames, factor).to(dtype) for factor in factors)


def multi_horizon_loss(
    preds: list[Tensor],
    video: Tensor,
    horizons: Any,
    consistency_weights: list[float],
    patch_sizes: tuple[int, ...] | None = None,
) -> Outputs:
    positions, frames, (channels, height, width) = preds[0].shape[1], video.shape[1], video.shape[2:]
    target = _frames(video)
    total = torch.zeros((), device=video.device)
    images = []
    for i, (pred, offset, factor) in enumerate(zip(preds, horizons.offsets, horizons.factors, strict=True)):
        goal = _shrunk(target, factor)
        images.append(pred.float())
        if patch_sizes is not None:
            goal = _patches(goal, patch_sizes[i])
            images[-1] = _image(pred.float(), patch_sizes[i], channels, height // factor, width // factor)
        inside = min(positions, frames - offset)
        total = total + F.mse_loss(pred[:, :inside].float(), goal[:, offset : offset + inside])
    for j in range(1, len(preds)):
        apart = horizons.offsets[j] - horizons.offsets[0]
        inside = min(positions - apart, frames - horizons.offsets[j])
        near = _shrunk(images[0][:, apart : apart + inside], horizons.factors[j] // horizons.factors[0])
        total = total + consistency_weights[j] * F.mse_loss(images[j][:, :inside], near)
    return (total,)


def multi_horizon_linear_cross_entropy(inputs: list[Tensor], weight: Tensor, tokens: Tensor, horizons: Any) -> Outputs:
    """The mean one-hot target never made dense: logsumexp minus the mean of the gathered logits."""
    ids = tokens if tokens.dim() == 5 else tokens.unsqueeze(-1)
    factored = ids.shape[-1]
    total = torch.zeros((), device=tokens.device)
    for state, offset, f in zip(inputs, horizons.offsets, horizons.factors, strict=True):
        logits = F.linear(state, weight).float().unflatten(-1, (factored, -1))
        height, width = ids.shape[2:4]
        cells = ids[:, offset : offset + state.shape[1]].unflatten(3, (width // f, f)).unflatten(2, (height // f, f))
        cells = cells.permute(0, 1, 2, 4, 6, 3, 5).flatten(5)
        loss = logits.logsumexp(-1) - logits.gather(-1, cells).mean(-1)
        total = total + loss.sum(-1).mean()
    return (total,)


FORMULAS: dict[str, Callable[..., Outputs]] = {
    formula.__name__: formula
    for formula in (
        action_window_sum,
        fan_out,
        multi_horizon_linear,
        mtp_combine,
        video_pyramid,
        multi_horizon_loss,
        multi_horizon_linear_cross_entropy,
    )
}


# ---- other libraries: linear cross-entropy of one horizon with hard targets, rows [N, D], ids [N]


def _torch_linear_cross_entropy() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda rows, weight, ids: F.linear_cross_entropy(rows, weight, ids, options=options)


def _liger() -> Callable[..., Tensor]:
    module = importlib.import_module("liger_kernel.transformers.functional")

    def loss(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        result = module.liger_fused_linear_cross_entropy(rows, weight, ids)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _cce() -> Callable[..., Tensor]:
    module = importlib.import_module("cut_cross_entropy")
    # Without its filter, which drops small gradients.
    return lambda rows, weight, ids: module.linear_cross_entropy(rows, weight, ids, filter_eps=None)


def _quack() -> Callable[..., Tensor]:
    module = importlib.import_module("quack.linear_cross_entropy")
    return module.chunked_linear_cross_entropy


# Name -> (needs a GPU, how to get it).
LIBRARIES: dict[str, tuple[bool, Callable[[], Callable[..., Tensor]]]] = {
    "F.linear_cross_entropy": (False, _torch_linear_cross_entropy),
    "Liger": (True, _liger),
    "CCE": (True, _cce),
    "QuACK": (True, _quack),
}


def of_library(linear_cross_entropy: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The token loss of all horizons by a library that takes one horizon's hard targets at a time."""

    def formula(inputs: list[Tensor], weight: Tensor, tokens: Tensor, horizons: Any) -> Outputs:
        total = torch.zeros((), device=tokens.device)
        for state, offset in zip(inputs, horizons.offsets, strict=True):
            targets = tokens[:, offset : offset + state.shape[1]]
            total = total + linear_cross_entropy(state.flatten(0, 3), weight, targets.flatten())
        return (total,)

    return formula


def expresses(kwargs: dict[str, Any]) -> bool:
    """Whether those libraries can state this call at all."""
    return set(kwargs["horizons"].factors) == {1} and kwargs["tokens"].dim() == 4
