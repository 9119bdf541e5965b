"""The rivals: plain PyTorch formulas, for eager and torch.compile, and other libraries.

A formula takes the keyword arguments of an op's benchmark call and returns its differentiable outputs. It is written as
an experienced user would write it, and covers the benchmark sizes: every clip is one episode, and only the options that
the sizes use exist.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels.check import different

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
    detach: str | None = "near",
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
        near, far = near.detach() if detach == "near" else near, images[j][:, :inside]
        total = total + consistency_weights[j] * compare(far.detach() if detach == "far" else far, near)
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
    softcap: float | None = None,
) -> Outputs:
    """Logsumexp minus the mean of the gathered logits, without a dense one-hot target. Horizons that are given the same
    state have the same logits, computed once."""
    total = torch.zeros((), device=tokens.device)
    all_logits, normalisers = [], []
    for i, (state, offset, factor) in enumerate(zip(inputs, horizons.offsets, horizons.factors, strict=True)):
        cells = _cells(tokens, state.shape[1], offset, factor)
        first = next(j for j in range(i + 1) if inputs[j] is state)
        if first == i:
            logits = F.linear(state, weight).float().unflatten(-1, (cells.shape[-2], -1))
            all_logits.append(logits if softcap is None else softcap * torch.tanh(logits / softcap))
            normalisers.append(all_logits[i].logsumexp(-1))
        else:
            all_logits.append(all_logits[first])
            normalisers.append(normalisers[first])
        loss = normalisers[i] - all_logits[i].gather(-1, cells).mean(-1)
        total = total + loss.sum(-1).mean()
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
    """The bare matrix products, forward and backward: all states' rows at once, with logits as their gradients."""
    rows = torch.cat([state.detach().flatten(0, 3) for state in different(kwargs["inputs"])]).to(dtype)
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
    """The token loss by another library, whose formula `load` returns, or raises ImportError.

    mixes      it takes class probabilities, not only ids
    softcaps   it has a softcap
    shares     it supports only horizons that are given one state, of the sizes of `is_text`
    error      the relative error that its number format explains, if it is larger than that of the states
    """

    needs_gpu: bool
    mixes: bool
    load: Callable[[], Callable[..., Outputs]]
    softcaps: bool = False
    shares: bool = False
    error: float = 0.0


def _torch_linear_cross_entropy() -> Callable[..., Outputs]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # It supports chunks only for ids.
        return F.linear_cross_entropy(rows, weight, target, options=None if target.is_floating_point() else options)

    return of_library(loss)


def _liger() -> Callable[..., Outputs]:
    module = importlib.import_module("liger_kernel.transformers.functional")

    def loss(rows: Tensor, weight: Tensor, ids: Tensor, **softcap: float) -> Tensor:
        result = module.liger_fused_linear_cross_entropy(rows, weight, ids, **softcap)
        return result[0] if isinstance(result, tuple) else result

    return of_library(loss)


def _cce() -> Callable[..., Outputs]:
    module = importlib.import_module("cut_cross_entropy")
    # filter_eps=None turns off its filter, which drops small gradients.
    return of_library(functools.partial(module.linear_cross_entropy, filter_eps=None))


def _quack() -> Callable[..., Outputs]:
    module = importlib.import_module("quack.linear_cross_entropy")
    return of_library(module.chunked_linear_cross_entropy)


@functools.cache
def _modded_nanogpt() -> Callable[..., Outputs]:
    path = os.environ.get("MFWM_MODDED_NANOGPT")
    if not path:
        raise ImportError("MFWM_MODDED_NANOGPT does not name its triton_kernels.py")
    spec = importlib.util.spec_from_file_location("modded_nanogpt_triton_kernels", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(f"MFWM_MODDED_NANOGPT names no Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return of_modded_nanogpt(module.FusedSoftcappedCrossEntropy)
    except Exception as error:  # It compiles CUDA when it is imported.
        raise ImportError(f"{path}: {type(error).__name__}: {str(error)[:200]}") from error


LIBRARIES = {
    "F.linear_cross_entropy": Library(False, True, _torch_linear_cross_entropy),
    "Liger": Library(True, False, _liger, softcaps=True),
    "CCE": Library(True, False, _cce, softcaps=True),
    "QuACK": Library(True, False, _quack),
    # It stores the gradients of logits in fp8 with 2 bits after the point, so each may be wrong by an eighth.
    "modded-nanogpt": Library(True, False, _modded_nanogpt, softcaps=True, shares=True, error=1 / 8),
}


def of_library(linear_cross_entropy: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The token loss of all horizons, for a library that takes one horizon and one of the F vocabularies at a time."""

    def formula(inputs: list[Tensor], weight: Tensor, tokens: Tensor, horizons: Any, **softcap: float) -> Outputs:
        total = torch.zeros((), device=tokens.device)
        for state, offset, factor in zip(inputs, horizons.offsets, horizons.factors, strict=True):
            rows, cells = state.flatten(0, 3), _cells(tokens, state.shape[1], offset, factor).flatten(0, 3)
            heads = weight.chunk(cells.shape[1])
            for head, ids in zip(heads, cells.unbind(1), strict=True):
                target = ids[:, 0] if factor == 1 else _mixes(ids, head)
                total = total + linear_cross_entropy(rows, head, target, **softcap)
        return (total,)

    return formula


def _mixes(ids: Tensor, head: Tensor) -> Tensor:
    """[N, V]: the means of the one-hot ids [N, f * f]."""
    share = head.new_full((), 1 / ids.shape[1]).expand_as(ids)
    return head.new_zeros(ids.shape[0], head.shape[0]).scatter_add_(1, ids, share)


# Rows of zeros after each clip, so that no target is another clip's, and products have a multiple of 16 rows.
GAP = 16


def of_modded_nanogpt(fused: Any) -> Callable[..., Outputs]:
    """The token loss of one state's K horizons by modded-nanogpt's FusedSoftcappedCrossEntropy: fp8 products, and one
    pass over the logits for all K. Row n of its sequence has the targets n to n + K - 1."""

    class Padded(torch.autograd.Function):
        """Its backward returns fewer gradients than its forward takes arguments, and takes the gradient of the losses
        to be 1."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.count = len(args)
            return fused.forward(ctx, *args)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            gradients = fused.backward(ctx, *upstream)
            return (*gradients, *(None,) * (ctx.count - len(gradients)))

    def formula(inputs: list[Tensor], weight: Tensor, tokens: Tensor, horizons: Any, softcap: float) -> Outputs:
        batch, positions, depth = *inputs[0].shape[:2], inputs[0].shape[-1]
        rows = F.pad(inputs[0].flatten(1, 3), (0, 0, 0, GAP)).flatten(0, 1)
        ids = tokens[:, horizons.offsets[0] :].flatten(1)
        ids = F.pad(ids, (0, positions + GAP - ids.shape[1])).flatten()
        scale = 1 / (batch * positions)
        losses = Padded.apply(
            rows, ids, torch.ones(len(inputs), device=tokens.device), None, None, weight.t().contiguous(),
            # The largest of the benchmark's normal states and weights, and of the gradients, in fp8.
            6 / 448, 6 / 448 / depth**0.5, scale * 0.75 / 448, scale,
            # Its A * sigmoid((z + B) / C) is our softcap, plus a constant.
            2 * softcap, 0.0, softcap / 2,
        )  # fmt: skip
        return (losses.view(batch, -1)[:, :positions].sum() * scale,)

    return formula


def is_text(kwargs: dict[str, Any]) -> bool:
    """One state's bf16 rows against the next ids, of the vocabulary that modded-nanogpt's kernel is compiled for."""
    states, offsets = kwargs["inputs"][0], kwargs["horizons"].offsets
    shared = all(entry is states for entry in kwargs["inputs"]) and offsets == tuple(range(1, len(offsets) + 1))
    cells = states.shape[2:4] == (1, 1) and states.dtype == torch.bfloat16
    return shared and cells and kwargs["weight"].shape[0] == 50304 and "softcap" in kwargs


def expresses(library: Library, kwargs: dict[str, Any]) -> bool:
    """Whether a library supports this call: pooled targets are mixes, and no library has a consistency term."""
    if "consistency_weights" in kwargs or ("softcap" in kwargs and not library.softcaps):
        return False
    return is_text(kwargs) if library.shares else library.mixes or set(kwargs["horizons"].factors) == {1}
