"""fan_out in Triton, called by autograd.call: the window sums, then one pass over the hidden state for all K horizons.

A program has a block of one position's tokens, as wide as the least common multiple of the pools, or 64 tokens. A warp
has whole rows, so that a norm needs no barrier (longer rows, or more accumulators than a warp has registers for, take
several warps). It goes through a cell of S x S tokens in boxes of 2 x 2, so that pools of 1, 2 and 4 are sums within a
thread. A pool as wide as the block is the sum of all cells. Any other pool ("wide") is handled first, in a loop of its
own that brings the block's tokens into cache, so that hidden is read from memory only once.

forward   Bytes: hidden once, the K outputs, the window sums.
backward  First the pooled states, with the sums of their gradients; then the tokens, which are read again from cache,
          because the accumulators of both at once would not fit in registers.
          Bytes: hidden once, the K gradients once, the gradient of hidden; and per program one row of D for each
          horizon's sums and for each norm weight and norm bias, which torch adds up in a fixed order. Gradients of wide
          cells go through a buffer of 1 / pool^2 the size of hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..grad_monitor import write_gram
from ..op import Gradients, Want
from ..ops.conditioning import conditioning_sums, gradients_of_sums, wants_sums
from ..ops.fan_out import Arguments
from .action_window_sum import gradients_of_sums as gradients_of_window
from .action_window_sum import window_sums
from .fan_out_backward import fan_out_backward
from .fan_out_forward import fan_out_forward
from .launch import ceil_div, launch, power_of_2, strides

# Tokens per program if a block is a single cell.
TOKENS_PER_PROGRAM = 64


class Plan(NamedTuple):
    """How a position's tokens are assigned to programs and warps: see the top of the file.

    order: the horizons from coarse boxes to fine ones.
    units: in that order, the side of the boxes on which a horizon's gradient is constant.
    total, chunk, chunks: cells of a position and of a program, programs of a position.
    exact: every row of every tile is a cell.
    rows, chunks_of_row, lanes: a tile's shape. Triton gives a thread 16 bytes, a warp's 32 threads the rest of `lanes`,
        and the next warp the next row; the chunks of a row are in the same threads.
    full: depth fills a row.
    per_thread: elements of a tile.
    """

    order: list[int]
    units: list[int]
    side: int
    s: int
    total: int
    chunk: int
    chunks: int
    tiles: int
    exact: bool
    rows: int
    chunks_of_row: int
    lanes: int
    full: bool
    warps: int
    per_thread: int


def plan_of(hidden: Tensor, pools: Sequence[int], lane: int) -> Plan:
    """A plan in which a thread has at most `lane` elements of a row, or more warps than one share a row."""
    height, width, depth = hidden.shape[2:]
    side, s = math.lcm(*pools), math.gcd(math.lcm(*pools), 4)
    total = height * width // s**2
    # One program handles a whole block of cells, because a wide cell spans several of them.
    chunk = (side // s) ** 2 if side > s else min(TOKENS_PER_PROGRAM // s**2, power_of_2(total))
    block, vector = power_of_2(depth), 16 // hidden.element_size()
    warps_per_row = min(16, max(1, block // (32 * lane)))
    lanes = min(block, 32 * vector * warps_per_row)
    # 4 warps, or 8 if they share rows; several short rows share a warp.
    rows = max(1, 8 // warps_per_row) if warps_per_row > 1 else 4 * max(1, 32 * vector // block)
    rows = min(rows, power_of_2(chunk))
    warps = max(1, rows * lanes // (32 * vector))
    cells = 4 * rows if s == 1 else rows
    tiles = ceil_div(chunk, cells)
    exact = tiles * cells == chunk and total % chunk == 0
    order = sorted(range(len(pools)), key=lambda i: -math.gcd(pools[i], s))
    units = [math.gcd(pools[i], s) for i in order]
    return Plan(
        order, units, side, s, total, chunk, ceil_div(total, chunk), tiles, exact, rows, block // lanes, lanes,
        block == depth, warps, rows * block // (32 * warps),
    )  # fmt: skip


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    outputs = [
        torch.empty(batch, positions, height // p, width // p, depth, dtype=hidden.dtype, device=hidden.device)
        for p in args.pool
    ]
    sums = conditioning_sums(args, window_sums, torch.float32)
    norm_weight, norm_bias = by_horizon(args, args.norm_weight), by_horizon(args, args.norm_bias)
    if norm_bias is not None:
        # Strides would take registers that the tile needs.
        norm_bias = norm_bias.contiguous()
    row_bytes = power_of_2(depth) * hidden.element_size()
    plan = plan_of(hidden, args.pool, 32 if row_bytes <= 2048 else 16)
    # 3 programs per SM instead of 2, where that needs no spills.
    roomy = plan.warps == 4 and row_bytes <= 1024 and args.norm_bias is None
    launch(
        fan_out_forward, batch * positions * plan.chunks, hidden.device,
        hidden, sums, norm_weight, norm_bias, tuple(outputs[i] for i in plan.order),
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2), LAYER=args.norm == "layer",
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order),
        SIDE=plan.side, S=plan.s, TILES=plan.tiles, ROWS=plan.rows, CHUNKS=plan.chunks_of_row, LANES=plan.lanes,
        FULL=plan.full, EXACT=plan.exact, num_warps=plan.warps, maxnreg=168 if roomy else min(255, 2048 // plan.warps),
    )  # fmt: skip
    return [output.squeeze(2) for output in outputs] if args.hidden.dim() == 4 else outputs, {}


def backward_lane(args: Arguments, s: int, monitored: bool) -> int:
    """Elements of a row per thread, few enough that the accumulators of the tokens' horizons fit in registers."""
    if monitored or args.norm == "layer" or args.hidden.shape[-1] > 1024:
        return 8
    narrow = args.norm_weight is None or args.norm_weight.dim() == 1
    return 32 if s == 4 and narrow and args.pool.count(1) == 1 and args.hidden.element_size() == 2 else 16


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    device, count = hidden.device, len(args.pool)
    sums = conditioning_sums(args, window_sums, torch.float32)
    norm_weight = by_horizon(args, args.norm_weight)
    monitored = want["hidden"] and args.norms is not None
    lane = backward_lane(args, math.gcd(math.lcm(*args.pool), 4), monitored)
    plan = plan_of(hidden, args.pool, lane)
    ordered = [None if upstream[i] is None else on_grid(upstream[i]) for i in plan.order]
    programs = batch * positions * plan.chunks
    hidden_gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if want["hidden"] else None
    cell_gradients = [
        None
        if plan.s % p == 0
        else torch.empty(batch, positions, height // p, width // p, depth, dtype=torch.float32, device=device)
        for p in (args.pool[i] for i in plan.order)
    ]
    sums_partial = torch.empty(programs, count, depth, dtype=torch.float32, device=device) if wants_sums(want) else None
    # One row of partial sums where all horizons share a parameter.
    norms, biases = (
        count if parameter is not None and parameter.dim() == 2 else 1
        for parameter in (args.norm_weight, args.norm_bias)
    )
    norm_partials = {
        name: torch.empty(programs, rows, depth, dtype=torch.float32, device=device) if want[name] else None
        for name, rows in (("norm_weight", norms), ("norm_bias", biases))
    }
    gram = torch.empty(programs, count, count, dtype=torch.float32, device=device) if monitored else None
    launch(
        fan_out_backward, programs, device,
        hidden, sums, norm_weight, tuple(ordered), None if args.scale is None else args.scale.contiguous(),
        hidden_gradient, tuple(cell_gradients), sums_partial, *norm_partials.values(), gram,
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2), tuple(strides(grad, 5) for grad in ordered),
        LAYER=args.norm == "layer",
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order), UNITS=tuple(plan.units),
        NORMS=norms, BIASES=biases,
        SIDE=plan.side, S=plan.s, TILES=plan.tiles, ROWS=plan.rows, CHUNKS=plan.chunks_of_row, LANES=plan.lanes,
        # With 32 elements per thread or several horizons of tokens, a second token's loads would spill.
        FULL=plan.full, EXACT=plan.exact, UNROLL=1 if plan.per_thread > 16 or args.pool.count(1) > 1 else 2,
        # In fp32, ptxas chooses a limit at which it spills 8 bytes (D = 256 on sm_80).
        num_warps=plan.warps, maxnreg=min(255, 2048 // plan.warps) if lane == 8 or hidden.dtype.itemsize == 4 else None,
    )  # fmt: skip
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram.sum(0, dtype=torch.float64), args.norms, args.cosines)

    gradients: Gradients = {}
    if hidden_gradient is not None:
        gradients["hidden"] = hidden_gradient.view(args.hidden.shape)
    for name, partial in norm_partials.items():
        if partial is not None:
            gradients[name] = partial.sum(0).view(getattr(args, name).shape).to(hidden.dtype)
    if sums_partial is not None:
        sums_gradient = sums_partial.view(batch, positions, plan.chunks, count, depth).sum(2)
        gradients |= gradients_of_sums(args, want, sums_gradient, gradients_of_window)
    return gradients


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def by_horizon(args: Arguments, parameter: Tensor | None) -> Tensor | None:
    """The norm's weight or bias as [K, D]; [D] is expanded without a copy."""
    return None if parameter is None else parameter.expand(len(args.pool), -1)
