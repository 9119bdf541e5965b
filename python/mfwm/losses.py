"""Losses of states and of motion, each a few lines over the ops of mfwm_kernels.

They return a HorizonLoss: `total` to minimise, and the mean and count of each horizon. HeadsConfig has an option for
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import HorizonLoss, Horizons, multi_horizon_linear_cross_entropy, multi_horizon_loss
from mfwm_kernels import arguments as check

__all__ = ["latent_consistency", "temporal_contrast", "temporal_difference"]


def temporal_contrast(
    states: Tensor,
    *,
    offset: int = 1,
    temperature: float = 0.1,
    segment_ids: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> HorizonLoss:
    """NT-Xent in time: the state `offset` positions later is told from all other positions of the clip and the batch.

    Equivalent, in one segment, to:

        z = F.normalize(states, dim=-1).flatten(0, 1)
        logits = (z @ z.T / temperature).fill_diagonal_(-inf).unflatten(0, (B, T))
        own = torch.arange(B * T).view(B, T)
        F.cross_entropy(logits[:, : T - offset].flatten(0, 1), own[:, offset:].flatten())

    The gradient flows into both sides of every pair, so the earlier state learns from the later one and the reverse.
    Normalised in fp32 (fp64 for fp64). It is the token loss, with every position as an entry of the vocabulary: its
    product is [B * T, D + B * T] by [B * T, D + B * T].

    Args:
        states: [B, T, D]; fp32, bf16, fp16 or fp64. One state per position: a mean over tokens, for example.
        offset: of the positive, in positions.
        temperature: what similarities, from -1 to 1, are divided by.
        segment_ids: [B, T] int32 or int64, the episode of each position. A position whose positive is in another
            episode does not count; it stays a negative of others.
        position_weights: [B, T], as in the ops: of the losses of these positions, which stay negatives of others.

    Returns:
        HorizonLoss of one horizon, with the count in positions and, as accuracy, the share of them whose most similar
        other position is the positive. Chance is 1 / (B * T - 1).

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: NT-Xent, arXiv 2002.05709; with positives in time: TCLR, arXiv 2101.07974, and GRWM, arXiv 2510.26782.
    """
    check.tensor("states", states, 3, "[B, T, D]")
    check.non_zero_sizes("states", states, ())
    check.integer("offset", offset, least=1)
    check.number("temperature", temperature, above=0)
    largest = torch.finfo(states.dtype).max
    if 2 / temperature + 128 > largest:
        raise ValueError(
            f"temperature must be > {2 / (largest - 128):.2g} for {check.names([states.dtype])}, got {temperature}"
        )
    batch, positions, _ = states.shape
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    z = F.normalize(wide, dim=-1).to(states.dtype)
    # A column per position takes it out of its own softmax: its logit is then at most -1 / temperature - 128, and the
    # least of another's is -1 / temperature.
    itself = torch.eye(batch * positions, dtype=z.dtype, device=z.device)
    keys = torch.cat([z.flatten(0, 1) / temperature, itself * -(2 / temperature + 128)], dim=1)
    queries = torch.cat([z, itself.unflatten(0, (batch, positions))], dim=2)
    own = torch.arange(batch * positions, device=z.device).view(batch, positions, 1, 1)
    return multi_horizon_linear_cross_entropy(
        [queries[:, :, None, None]],
        keys,
        own,
        Horizons((offset,), (1,)),
        segment_ids=segment_ids,
        position_weights=position_weights,
        return_accuracy=True,
    )


def latent_consistency(
    states: Sequence[Tensor],
    hidden: Tensor,
    horizons: Horizons,
    *,
    horizon_weights: Tensor | Sequence[float] | None = None,
    segment_ids: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> HorizonLoss:
    """The states that predict frame n + k_i against the hidden state that has seen it.

    Equivalent, in one segment, to the sum over i of horizon_weights[i] times:

        target = avg_pool(hidden.detach(), factors[i])
        F.mse_loss(states[i][:, : T - offsets[i]], target[:, offsets[i] :])

    The hidden state is the target and gets no gradient. Neither side is normalised here: if their scales are free, pass
    both through F.rms_norm.

    Args:
        states: K tensors [B, T, H / f_i, W / f_i, D]; fp32, bf16, fp16 or fp64, any strides.
        hidden: [B, T, H, W, D]. Position n has seen frames <= n.
        horizons: offsets in positions, factors by which the grids of the states are smaller.
        horizon_weights, position_weights: as in multi_horizon_loss.
        segment_ids: [B, T] int32 or int64, the episode of each position: no pair crosses from one to another.

    Returns:
        HorizonLoss with counts in elements.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: LSE-MTP, arXiv 2604.06155.
    """
    check_horizons(horizons)
    check.tensor("hidden", hidden, 5, "[B, T, H, W, D]")
    states = check.tensors("states", states, len(horizons), 5, "[B, T, H / f, W / f, D]")
    batch, positions, height, width, depth = hidden.shape
    for i, (state, factor) in enumerate(zip(states, horizons.factors, strict=True)):
        if height % factor or width % factor:
            raise ValueError(f"factors[{i}] = {factor} does not divide the grid {height} x {width} of hidden")
        expected = (batch, positions, height // factor, width // factor, depth)
        check.shape(f"states[{i}]", state, expected, "[B, T, H / f, W / f, D]")
    return multi_horizon_loss(
        [state.movedim(-1, 2) for state in states],
        hidden.detach().movedim(-1, 2),
        horizons,
        horizon_weights=horizon_weights,
        segment_ids=segment_ids,
        position_weights=position_weights,
    )


def temporal_difference(
    preds: Sequence[Tensor],
    video: Tensor,
    horizons: Horizons,
    *,
    horizon_weights: Tensor | Sequence[float] | None = None,
    patch_sizes: Sequence[int] | None = None,
    residual: bool = False,
    segment_ids: Tensor | None = None,
    position_weights: Tensor | None = None,
    grid: Sequence[int] | None = None,
) -> HorizonLoss:
    """The change from each prediction to the next one against the change of the true frames.

    Equivalent, in one segment, to the sum over i of horizon_weights[i] times:

        errors = preds[i][:, : V - offsets[i]] - avg_pool(video, factors[i])[:, offsets[i] : offsets[i] + T]
        (errors[:, 1:] - errors[:, :-1]).square().mean()

    An error that stays the same from frame to frame costs nothing here, and one that flickers does.

    Args:
        preds, video, horizons, horizon_weights, patch_sizes, residual, grid: as in multi_horizon_loss, of kind "mse".
        segment_ids: [B, V], the episode of each frame. The frames from n to n + k_i + 1 must be in one.
        position_weights: [B, T] or [B, T, K]: a pair counts where both of its predictions have a weight above 0, which
            does not multiply it.

    Returns:
        HorizonLoss with counts in elements of the T - 1 changes.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value; where multi_horizon_loss raises them, their
            T and T_v are those of the changes, less by one.

    Source: the squared difference of successive errors, a plain form of motion consistency. arXiv 2501.07563 compares
    how features of successive frames correlate; motion_gain of multi_horizon_loss weighs by change, as arXiv 2601.20504
    does.
    """
    check_horizons(horizons)
    letters = "[B, T, C, H / f, W / f], or [B, T, S, C] in the layout of tokens"
    preds = check.tensors("preds", preds, len(horizons), (4, 5), letters)
    check.tensor("video", video, (4, 5), "[B, V, C, H, W], or [B, V, S, C] with grid", (torch.uint8, *check.FLOATING))
    positions, frames = preds[0].shape[1], video.shape[1]
    if not 1 <= positions <= frames:
        raise ValueError(f"preds must have T positions, 1 <= T <= V = {frames}, the frames of video; got {positions}")
    check.segments(segment_ids, video.shape[0], frames, "V", "video", video)
    pairs = pairs_that_count(horizons, positions, frames, segment_ids, device=video.device)
    weights = pairs.expand(video.shape[0], -1, -1).float()
    if position_weights is not None:
        letters = "[B, T] or [B, T, K]"
        check.tensor("position_weights", position_weights, (2, 3), letters, (torch.float32, torch.float64))
        size = (video.shape[0], positions, len(horizons))[: position_weights.dim()]
        check.shape("position_weights", position_weights, size, letters)
        check.same_device("position_weights", position_weights, "video", video)
        weighted = position_weights if position_weights.dim() == 3 else position_weights[..., None]
        least = torch.minimum(weighted[:, 1:], weighted[:, :-1])
        # Negative and NaN weights stay as they are, and the op refuses them.
        weights = torch.where(least > 0, weights, least)
    wide = video.to(torch.promote_types(video.dtype, torch.float32))
    return multi_horizon_loss(
        [pred[:, 1:] - pred[:, :-1] for pred in preds],
        wide[:, 1:] - wide[:, :-1],
        horizons,
        horizon_weights=horizon_weights,
        patch_sizes=patch_sizes,
        residual=residual,
        scale=1 / 127.5 if video.dtype == torch.uint8 else 1.0,
        position_weights=weights,
        grid=grid,
    )


def check_horizons(horizons: object) -> None:
    if not isinstance(horizons, Horizons):
        raise TypeError(f"horizons must be a Horizons, got {type(horizons).__name__}")


def pairs_that_count(
    horizons: Horizons, positions: int, frames: int, segment_ids: Tensor | None, *, device: Any = None
) -> Tensor:
    """[B, T - 1, K] bool: where a horizon counts at n and at n + 1, in one segment; B is 1 without segment_ids."""
    valid = [horizons.valid(i, positions, frames, segment_ids, device=device) for i in range(len(horizons))]
    both = torch.stack([counts[:, 1:] & counts[:, :-1] for counts in valid], dim=-1)
    if segment_ids is None:
        return both
    return both & (segment_ids[:, 1:positions] == segment_ids[:, : positions - 1])[..., None]
