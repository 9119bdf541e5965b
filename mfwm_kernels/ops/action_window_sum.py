"""action_window_sum: the sum of the actions between a position and the frame that a horizon predicts.

out[b, n, i] = sum_{j = window_start}^{offsets[i] - 1} w[i, j] * actions[b, n + j],  w = lag_weight or 1

Terms past the last action, or in another segment than position n, are omitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import follow
from ..horizons import check_non_decreasing, valid_at
from ..op import Backend, Cost, Op, register


class Arguments(NamedTuple):
    actions: Tensor
    lag_weight: Tensor | None
    segment_ids: Tensor | None
    offsets: list[int]
    window_start: int


def action_window_sum(
    actions: Tensor,
    offsets: Sequence[int],
    *,
    lag_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window_start: int = 1,
) -> Tensor:
    """For each horizon, the sum of the actions that its prediction needs and that the hidden state has not seen.

    Equivalent to:

        shifted = [F.pad(actions, (0, 0, 0, j))[:, j:] for j in range(max(offsets))]  # [:, n] is action n + j
        terms = [[lag_weight[i, j] * shifted[j] for j in range(window_start, k)] for i, k in enumerate(offsets)]
        torch.stack([sum(term, torch.zeros_like(actions)) for term in terms], dim=2)

    Actions past the end are left out, and so are those in another segment than position n. The terms are added in fp32
    (fp64 for fp64), directly and never as a difference of running sums, which would cancel.

    Args:
        actions: [B, T, D] embeddings or raw action vectors, fp32, bf16, fp16 or fp64, any strides.
        offsets: K non-decreasing integers >= 0, in frames.
        lag_weight: [K, max(1, max(offsets)), D], dtype of actions: a gate for each lag j, because a plain sum loses the
            order of the actions. Differentiable. None: gates of 1.
        segment_ids: [B, T] int32 or int64, the episode of each action.
        window_start: the first lag of the sum: 1 if the hidden state at n has seen action n, 0 if it has not. A wrong
            one raises no error.

    Returns:
        [B, T, K, D], dtype of actions. Differentiable with respect to actions and lag_weight.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: the action bias of "Multi-Frame Prediction for World Models".
    """
    check.tensor("actions", actions, 3, "[B, T, D]")
    check.non_zero_sizes("actions", actions)
    checked = check_window(actions, "actions", offsets, lag_weight, segment_ids, window_start)
    return call(OP, Arguments(actions, *checked))[0]


def check_window(
    actions: Tensor,
    name: str,
    offsets: Sequence[int],
    lag_weight: Tensor | None,
    segment_ids: Tensor | None,
    window_start: int,
) -> tuple[Tensor | None, Tensor | None, list[int], int]:
    """The checks that all ops with an action window share."""
    offsets = check.integers("offsets", offsets, least=0)
    if not offsets:
        raise ValueError("offsets must name at least one horizon, got ()")
    check_non_decreasing(offsets)
    window_start = check.integer("window_start", window_start, least=0)
    lag_weight = follow(lag_weight, actions)
    if lag_weight is not None:
        check.tensor("lag_weight", lag_weight, 3, "[K, max(1, max k), D]")
        lags = max(1, offsets[-1])
        check.shape("lag_weight", lag_weight, (len(offsets), lags, actions.shape[2]), "[K, max(1, max offsets), D]")
        check.like("lag_weight", lag_weight, name, actions)
    check.segments(segment_ids, actions.shape[0], actions.shape[1], "T_a", name, actions)
    return lag_weight, segment_ids, list(offsets), window_start


def reference(args: Arguments) -> tuple[Tensor]:
    return (window_sum(args, args.actions.shape[1]).to(args.actions.dtype),)


def window_sum(args: Arguments, positions: int) -> Tensor:
    """[B, positions, K, D] in fp32 (fp64 for fp64): the sums at the first `positions`, which may exceed the actions."""
    actions = args.actions
    batch, columns, width = actions.shape
    computed = actions.to(torch.promote_types(actions.dtype, torch.float32))
    sums = []
    for i, offset in enumerate(args.offsets):
        total = computed.new_zeros(batch, positions, width)
        # Lags of `columns` or more are past the last action.
        for j in range(args.window_start, min(offset, columns)):
            inside = max(0, min(positions, columns - j))
            same = valid_at(j, inside, columns, args.segment_ids, batch, actions.device)
            term = torch.where(same[..., None], computed[:, j : j + inside], 0)
            if args.lag_weight is not None:
                term = term * args.lag_weight[i, j].to(computed.dtype)
            total = total + torch.nn.functional.pad(term, (0, 0, 0, positions - inside))
        sums.append(total)
    return torch.stack(sums, dim=2)


def fake(args: Arguments) -> list[Tensor]:
    batch, positions, width = args.actions.shape
    return [args.actions.new_empty(batch, positions, len(args.offsets), width)]


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 9]], device=device)
    yield {"actions": normal(2, 7, 5), "offsets": (1, 2, 4, 8)}
    yield {"actions": normal(2, 7, 24), "offsets": (0, 1, 3), "window_start": 0, "lag_weight": normal(3, 3, 24)}
    yield {"actions": normal(7, 2, 16).transpose(0, 1), "offsets": (2, 2, 5), "segment_ids": segments}
    yield {
        "actions": normal(2, 7, 34)[..., ::2],
        "offsets": (1, 4),
        "lag_weight": normal(2, 4, 17),
        "segment_ids": segments.int(),
    }
    yield {"actions": normal(1, 1, 3), "offsets": (0,)}
    yield {"actions": normal(0, 4, 3), "offsets": (1, 3)}
    yield {"actions": normal(2, 0, 3), "offsets": (1, 3)}


def cost(kwargs: dict[str, Any]) -> Cost:
    actions, count = kwargs["actions"], len(kwargs["offsets"])
    # Forward reads actions and writes K sums; backward reads the K gradients and writes one.
    terms = sum(max(0, offset - kwargs.get("window_start", 1)) for offset in kwargs["offsets"])
    return Cost(actions.element_size() * actions.numel() * (2 + 2 * count), 4 * terms * actions.numel())


def _bench(batch: int, positions: int, width: int) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        return {"actions": torch.randn(batch, positions, width, device=device).to(dtype), "offsets": (1, 2, 4, 8)}

    return make


KERNELS = ("action_window_sum_forward", "action_window_sum_backward")

OP = register(
    Op(
        name="action_window_sum",
        arguments=Arguments,
        differentiable=("actions", "lag_weight"),
        reference=reference,
        fake=fake,
        public=action_window_sum,
        samples=samples,
        cost=cost,
        bench={
            "cpu": _bench(32, 16, 512),
            "genie": _bench(36, 16, 512),
            "pixels": _bench(32, 24, 1024),
            "latents": _bench(16, 32, 1024),
            "1x": _bench(16, 16, 256),
        },
        backends={
            "cpu": Backend(KERNELS, dtypes=check.FLOATING),
            "triton": Backend((*KERNELS, "action_window_sum_gates")),
        },
    )
)
