"""fan_out on the CPU: the window sums first, then one pass over the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..monitor import write_gram
from ..ops.action_window_sum import Arguments as WindowArguments
from ..ops.fan_out import Arguments
from . import kernels, precision, raw
from .action_window_sum import gradients_of_sums, window_sums


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    outputs = [hidden.new_empty(batch, positions, height // p, width // p, depth) for p in args.pool]
    # The sums are kept in the precision that is computed in.
    sums = window_sums(window_of(args), positions, precision(hidden.dtype))
    outputs_raw = [raw(output) for output in outputs]
    kernels.fan_out_forward(*conditioned(args, hidden, sums), outputs_raw, torch.get_num_threads())
    if args.hidden.dim() == 4:
        outputs = [output.squeeze(2) for output in outputs]
    return outputs, []


def backward(args: Arguments, wanted: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor]:
    want = dict.fromkeys(("hidden", "actions", "norm_weight", "lag_weight"), False)
    present = [name for name in want if getattr(args, name) is not None]
    want.update(zip(present, wanted, strict=True))

    hidden = on_grid(args.hidden)
    count, depth = len(args.pool), hidden.shape[-1]
    computed = precision(hidden.dtype)
    sums = window_sums(window_of(args), hidden.shape[1], computed)
    upstream = [None if grad is None else on_grid(grad) for grad in grads]
    of_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if want["hidden"] else None
    needs_sums = want["actions"] or want["lag_weight"]
    of_sums = hidden.new_empty(*hidden.shape[:2], count, depth, dtype=computed) if needs_sums else None
    of_norm = torch.empty(count, depth, dtype=torch.float64, device=hidden.device) if want["norm_weight"] else None
    monitored = want["hidden"] and args.norms is not None
    gram = torch.empty(count, count, dtype=torch.float64, device=hidden.device) if monitored else None
    kernels.fan_out_backward(
        *conditioned(args, hidden, sums),
        [raw(grad) for grad in upstream],
        torch.get_num_threads(),
        raw(of_hidden),
        raw(of_sums),
        raw(of_norm),
        raw(gram),
        [] if args.scale is None else args.scale.tolist(),
    )
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)

    made: dict[str, Tensor] = {}
    if of_hidden is not None:
        made["hidden"] = of_hidden.view(args.hidden.shape)
    if of_norm is not None:
        assert args.norm_weight is not None
        made["norm_weight"] = (of_norm.sum(0) if args.norm_weight.dim() == 1 else of_norm).to(args.norm_weight.dtype)
    if of_sums is not None:
        names = [name for name in ("actions", "lag_weight") if name in present]
        tensors = gradients_of_sums(window_of(args), [want[name] for name in names], of_sums)
        made.update(zip([name for name in names if want[name]], tensors, strict=True))
    return [made[name] for name in present if want[name]]


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def window_of(args: Arguments) -> WindowArguments:
    return WindowArguments(args.actions, args.lag_weight, args.segment_ids, args.offsets, args.window_start)


def conditioned(args: Arguments, hidden: Tensor, sums: Tensor) -> tuple[object, ...]:
    """The arguments that both kernels begin with."""
    norm_weight = None if args.norm_weight is None else args.norm_weight.expand(len(args.pool), -1)
    return raw(hidden), raw(sums), raw(norm_weight), args.pool, args.norm_eps
