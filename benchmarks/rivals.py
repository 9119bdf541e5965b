"""The rivals: plain PyTorch formulas, for eager and torch.compile, and other libraries.

A formula takes the keyword arguments of an op's benchmark call and returns its differentiable outputs. It is written as
an experienced user would write it, and covers the benchmark sizes: every clip is one episode, and only the options that
the sizes use exist.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]


def action_window_sum(actions: Tensor, offsets: tuple[int, ...]) -> Outputs:
    return (torch.stack([_window(actions, offset) for offset in offsets], dim=2),)


def _window(actions: Tensor, offset: int) -> Tensor:
    """The fp32 sum of the actions n + 1 .. n + offset - 1, for every action n."""
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
        state = cells + _window(actions, offset)[:, : hidden.shape[1], None, None]
        states.append(F.rms_norm(state, (state.shape[-1],), norm_weight, 1e-6))
    return tuple(states)


def multi_horizon_linear(
    hidden: Tensor, actions: Tensor, weights: list[Tensor], horizons: Any, norm_weight: Tensor
) -> Outputs:
    outputs = []
    for offset, weight in zip(horizons.offsets, weights, strict=True):
        state = hidden + _window(actions, offset)[:, : hidden.shape[1], None, None]
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


def _grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, T, S, C] as images."""
    return features.unflatten(2, grid).permute(0, 1, 4, 2, 3)


def video_pyramid(video: Tensor, factors: tuple[int, ...], dtype: torch.dtype) -> Outputs:
    frames = _frames(video)
    return tuple(_shrunk(frames, factor).to(dtype) for factor in factors)


def multi_horizon_loss(
    preds: list[Tensor],
    video: Tensor,
    horizons: Any,
    consistency_weights: list[float] | None = None,
    patch_sizes: tuple[int, ...] | None = None,
    kind: str = "mse",
    grid: tuple[int, int] | None = None,
    horizon_weights: Sequence[float] | None = None,
) -> Outputs:
    compare = {"mse": F.mse_loss, "l1": F.l1_loss}[kind]
    if grid is not None:
        video = _grid(video, grid)
        preds = [_grid(pred, (grid[0] // f, grid[1] // f)) for pred, f in zip(preds, horizons.factors, strict=True)]
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
        weight = 1.0 if horizon_weights is None else horizon_weights[i]
        total = total + weight * compare(pred[:, :inside].float(), goal[:, offset : offset + inside])
    for j in range(1, len(preds) if consistency_weights is not None else 0):
        apart = horizons.offsets[j] - horizons.offsets[0]
        inside = min(positions - apart, frames - horizons.offsets[j])
        near = _shrunk(images[0][:, apart : apart + inside], horizons.factors[j] // horizons.factors[0])
        total = total + consistency_weights[j] * compare(images[j][:, :inside], near)
    return (total,)


def _cells(tokens: Tensor, positions: int, offset: int, f: int) -> Tensor:
    """[B, T, h, w, F, f * f]: the ids that each cell of a horizon covers."""
    ids = (tokens if tokens.dim() == 5 else tokens.unsqueeze(-1))[:, offset : offset + positions]
    height, width = ids.shape[2:4]
    blocks = ids.unflatten(3, (width // f, f)).unflatten(2, (height // f, f))
    return blocks.permute(0, 1, 2, 4, 6, 3, 5).flatten(5)


def multi_horizon_linear_cross_entropy(
    inputs: list[Tensor],
    weight: Tensor,
    tokens: Tensor,
    horizons: Any,
    consistency_weights: list[float] | None = None,
) -> Outputs:
    """Logsumexp minus the mean of the gathered logits, without a dense one-hot target."""
    total = torch.zeros((), device=tokens.device)
    all_logits = []
    for state, offset, factor in zip(inputs, horizons.offsets, horizons.factors, strict=True):
        cells = _cells(tokens, state.shape[1], offset, factor)
        logits = F.linear(state, weight).float().unflatten(-1, (cells.shape[-2], -1))
        loss = logits.logsumexp(-1) - logits.gather(-1, cells).mean(-1)
        total = total + loss.sum(-1).mean()
        all_logits.append(logits)
    if consistency_weights is None:
        return (total,)
    teachers = all_logits[0].detach().softmax(-1)
    for j in range(1, len(inputs)):
        apart, f = horizons.offsets[j] - horizons.offsets[0], horizons.factors[j] // horizons.factors[0]
        later = teachers[:, apart:]
        height, width = later.shape[2:4]
        teacher = later.unflatten(3, (width // f, f)).unflatten(2, (height // f, f)).mean((3, 5))
        far = all_logits[j][:, : later.shape[1]].log_softmax(-1)
        total = total - consistency_weights[j] * (teacher * far).sum((-1, -2)).mean()
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


def formula_of(name: str) -> Callable[..., Outputs]:
    if name not in FORMULAS:
        raise ValueError(
            f"benchmarks/rivals.py must have {name} as eager PyTorch, among FORMULAS: {', '.join(FORMULAS)}"
        )
    return FORMULAS[name]


def cross_entropy_products(kwargs: dict[str, Any], dtype: torch.dtype) -> Callable[[], None]:
    """The bare matrix products, forward and backward: rows of all horizons at once, with logits as their gradients."""
    rows = torch.cat([state.detach().flatten(0, 3) for state in kwargs["inputs"]]).to(dtype)
    weight = kwargs["weight"].detach().to(dtype)
    logits, rows_gradient, weight_gradient = rows @ weight.t(), torch.empty_like(rows), torch.empty_like(weight)

    def call() -> None:
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=rows_gradient)
        torch.mm(logits.t(), rows, out=weight_gradient)

    return call


def linear_products(kwargs: dict[str, Any], dtype: torch.dtype) -> Callable[[], None]:
    """The bare matrix products, forward and backward: the heads concatenated, with outputs as their gradients."""
    rows = kwargs["hidden"].detach().flatten(0, -2).to(dtype)
    weight = torch.cat([head.detach() for head in kwargs["weights"]]).to(dtype)
    outputs, rows_gradient, weight_gradient = rows @ weight.t(), torch.empty_like(rows), torch.empty_like(weight)

    def call() -> None:
        torch.mm(rows, weight.t(), out=outputs)
        torch.mm(outputs, weight, out=rows_gradient)
        torch.mm(outputs.t(), rows, out=weight_gradient)

    return call


PRODUCTS: dict[str, Callable[[dict[str, Any], torch.dtype], Callable[[], None]]] = {
    "multi_horizon_linear": linear_products,
    "multi_horizon_linear_cross_entropy": cross_entropy_products,
}


class Library(NamedTuple):
    """A linear cross-entropy of rows [N, D] and ids [N], or if `mixes` of class probabilities [N, V] too."""

    needs_gpu: bool
    mixes: bool
    load: Callable[[], Callable[..., Tensor]]


def _torch_linear_cross_entropy() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # It supports chunks only for ids.
        return F.linear_cross_entropy(rows, weight, target, options=None if target.is_floating_point() else options)

    return loss


def _liger() -> Callable[..., Tensor]:
    module = importlib.import_module("liger_kernel.transformers.functional")

    def loss(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        result = module.liger_fused_linear_cross_entropy(rows, weight, ids)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _cce() -> Callable[..., Tensor]:
    module = importlib.import_module("cut_cross_entropy")
    # filter_eps=None turns off its filter, which drops small gradients.
    return lambda rows, weight, ids: module.linear_cross_entropy(rows, weight, ids, filter_eps=None)


def _quack() -> Callable[..., Tensor]:
    module = importlib.import_module("quack.linear_cross_entropy")
    return module.chunked_linear_cross_entropy


LIBRARIES = {
    "F.linear_cross_entropy": Library(False, True, _torch_linear_cross_entropy),
    "Liger": Library(True, False, _liger),
    "CCE": Library(True, False, _cce),
    "QuACK": Library(True, False, _quack),
}


def of_library(linear_cross_entropy: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The token loss of all horizons, for a library that takes one horizon and one of the F vocabularies at a time."""

    def formula(inputs: list[Tensor], weight: Tensor, tokens: Tensor, horizons: Any) -> Outputs:
        total = torch.zeros((), device=tokens.device)
        for state, offset, factor in zip(inputs, horizons.offsets, horizons.factors, strict=True):
            rows, cells = state.flatten(0, 3), _cells(tokens, state.shape[1], offset, factor).flatten(0, 3)
            heads = weight.chunk(cells.shape[1])
            for head, ids in zip(heads, cells.unbind(1), strict=True):
                target = ids[:, 0] if factor == 1 else _mixes(ids, head)
                total = total + linear_cross_entropy(rows, head, target)
        return (total,)

    return formula


def _mixes(ids: Tensor, head: Tensor) -> Tensor:
    """[N, V]: the means of the one-hot ids [N, f * f]."""
    share = head.new_full((), 1 / ids.shape[1]).expand_as(ids)
    return head.new_zeros(ids.shape[0], head.shape[0]).scatter_add_(1, ids, share)


def expresses(library: Library, kwargs: dict[str, Any]) -> bool:
    """Whether a library supports this call: pooled targets are mixes, and no library has a consistency term."""
    return "consistency_weights" not in kwargs and (library.mixes or set(kwargs["horizons"].factors) == {1})
