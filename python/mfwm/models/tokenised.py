"""The loss of far tokens against the ids of smaller frames, which a tokenizer encoded on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mfwm_kernels import HorizonLoss, Horizons, multi_horizon_linear_cross_entropy
from mfwm_kernels import arguments as check


def tokenised_loss(
    states: Sequence[Tensor],
    heads: list[Tensor] | Tensor,
    biases: list[Tensor | None] | Tensor | None,
    tokens: Tensor,
    low_tokens: Mapping[int, Tensor],
    horizons: Horizons,
    weights: Tensor | Sequence[float] | None,
    token_mask: Tensor | None,
    *,
    segment_ids: Tensor | None,
    position_weights: Tensor | None,
    return_accuracy: bool,
    return_predictions: bool,
) -> HorizonLoss:
    """One call for all horizons of the same factor, because they share their ids: `tokens`, or low_tokens[factor]."""
    parts: list[HorizonLoss] = []
    order: list[int] = []
    of_each = False
    if isinstance(position_weights, Tensor) and position_weights.dim() == 3:
        of_each = True
        check.shape("position_weights", position_weights, (*position_weights.shape[:2], len(horizons)), "[B, T, K]")
    check_low_tokens(low_tokens, horizons, tokens)
    for factor in sorted(set(horizons.factors)):
        chosen = [i for i, f in enumerate(horizons.factors) if f == factor]
        of_part = weights[chosen] if isinstance(weights, Tensor) else weights and [weights[i] for i in chosen]
        part = multi_horizon_linear_cross_entropy(
            [states[i] for i in chosen],
            heads if isinstance(heads, Tensor) else [heads[i] for i in chosen],
            tokens if factor == 1 else low_tokens[factor],
            Horizons(tuple(horizons.offsets[i] for i in chosen), (1,) * len(chosen)),
            biases=[biases[i] for i in chosen] if isinstance(biases, list) else biases,
            horizon_weights=of_part,
            segment_ids=segment_ids,
            token_mask=token_mask if factor == 1 else None,
            position_weights=position_weights[..., chosen] if of_each else position_weights,  # type: ignore[index]
            return_accuracy=return_accuracy,
            return_predictions=return_predictions,
        )
        parts.append(part)
        order += chosen
    position = [order.index(i) for i in range(len(order))]
    total = torch.stack([part.total for part in parts]).sum()
    means, counts, consistency, consistency_counts, accuracy = (
        torch.cat([part[f] for part in parts])[position]  # type: ignore[misc]
        for f in range(1, 6)
    )
    found = [ids for part in parts for ids in part.predictions or ()]
    predictions = tuple(found[i] for i in position) if return_predictions else None
    return HorizonLoss(total, means, counts, consistency, consistency_counts, accuracy, predictions)


def check_low_tokens(low_tokens: Mapping[int, Tensor], horizons: Horizons, tokens: Tensor) -> None:
    """ValueError or TypeError unless there are ids of each factor's smaller frames, one for each frame of `tokens`."""
    batch, frames, height, width, *ids_per_token = tokens.shape
    letters = "[B, V, H / factor, W / factor" + (", ids_per_token]" if ids_per_token else "]")
    for factor in sorted(set(horizons.factors) - {1}):
        if factor not in low_tokens:
            raise ValueError(f"low_tokens must have the ids of factor {factor}, got factors {sorted(low_tokens)}")
        name, ids = f"low_tokens[{factor}]", low_tokens[factor]
        check.tensor(name, ids, tokens.dim(), letters, check.INTEGER_IDS)
        check.shape(name, ids, (batch, frames, height // factor, width // factor, *ids_per_token), letters)
        check.same_device(name, ids, "video", tokens)
