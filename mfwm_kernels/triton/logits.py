"""What the token-loss kernels share: rows of logits with bias and softcap, their tiles, and powers of 2.

A row belongs to one warp, up to 2048 logits, so that its reductions are shuffles and wait for no other warp; 32
programs of one warp on an SM have 64 KB of rows in flight. Longer rows have a warp per 2048 logits, or four that loop.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import IN_INTERPRETER, power_of_2

# The longest row that registers hold, the block size for longer rows, and the most logits and ids of a warp.
LONGEST = 16384
LOOPED = 4096
WARP_LOGITS = 2048
WARP_IDS = 1024

# Finite, because the difference of two infinities is not a number.
LOWEST = tl.constexpr(-1e38)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def power(x):
    """2 ** x in one instruction: 0 where the result would be denormal, which exp2 takes three more to represent."""
    if IN_INTERPRETER:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), in fp32."""
    z = x.to(tl.float32)
    if SOFTCAP:
        # Near 0 this loses digits to cancellation, but a softmax needs differences of logits: of those the error is
        # 1e-7 softcap, less than that of the product which computed them.
        z = softcap - 2 * softcap / (power(z * (2 * LOG2_E / softcap)) + 1)
    return z


@triton.jit
def through_cap(gradient, z, softcap, SOFTCAP: tl.constexpr):
    """The gradient of the logits, given the gradient of the capped logits z."""
    if SOFTCAP:
        gradient = gradient * (1 - (z / softcap) * (z / softcap))
    return gradient


@triton.jit
def load_biased(logits, start, biases, bias_start, column, mask):
    """Columns of rows of logits plus biases, in fp32 where there are any; 0 outside the mask, None for all. The starts
    are scalars, or [ROWS, 1] for several rows at once."""
    at = logits + (start + column)
    z = tl.load(at) if mask is None else tl.load(at, mask, 0)
    if biases is not None:
        at = biases + (bias_start + column)
        z = z.to(tl.float32) + (tl.load(at) if mask is None else tl.load(at, mask, 0))
    return z


@triton.jit
def load_row(logits, start, biases, bias_start, column, mask, softcap, SOFTCAP: tl.constexpr):
    """The same, capped and in fp32; -inf outside the mask."""
    z = capped(load_biased(logits, start, biases, bias_start, column, mask), softcap, SOFTCAP)
    return z if mask is None else tl.where(mask, z, float("-inf"))


@triton.jit
def each(x, ROWS: tl.constexpr):
    """A number per row, to be combined with its columns."""
    return x if ROWS == 1 else x[:, None]


@triton.jit
def statistics_of_long_row(
    logits, start, biases, bias_start, vocabulary, softcap,
    SOFTCAP: tl.constexpr, SMOOTHS: tl.constexpr, COMPARES: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest logit; the sum of exp(logit - largest); the sum of the logits if SMOOTHS; the first column of the
    largest if COMPARES. Until the end each lane reduces its own columns."""
    largest = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    z_sum = tl.zeros([LANES], tl.float32)
    argmax = tl.zeros([LANES], tl.int32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = None if FULL else column < vocabulary
        z = load_row(logits, start, biases, bias_start, column, mask, softcap, SOFTCAP)
        z = tl.reshape(z, [BLOCK // (LANES * VECTOR), LANES, VECTOR])
        here = tl.max(tl.max(z, 2), 0)
        if COMPARES:
            column = tl.reshape(column, z.shape)
            argmax_here = tl.min(tl.min(tl.where(z == here[None, :, None], column, 2**31 - 1), 2), 0)
            argmax = tl.where(here > largest, argmax_here, argmax)
        if SMOOTHS:
            z_sum += tl.sum(tl.sum(z if FULL else tl.where(z == float("-inf"), 0.0, z), 2), 0)
        most = tl.maximum(largest, here)
        powers = power(z * LOG2_E - (most * LOG2_E)[None, :, None])
        total = total * power((largest - most) * LOG2_E) + tl.sum(tl.sum(powers, 2), 0)
        largest = most
    row_largest = tl.max(largest, 0)
    argmax_of_row = tl.min(tl.where(largest == row_largest, argmax, 2**31 - 1), 0)
    row_total = tl.sum(total * power((largest - row_largest) * LOG2_E), 0)
    return row_largest, row_total, tl.sum(z_sum, 0), argmax_of_row


def tile_of(vocabulary: int, itemsize: int, ids: int = 1, most_rows: int = 8) -> dict[str, Any]:
    """The tile of a program: ROWS rows in one block, or one row in blocks. FULL: without columns past the end. VECTOR
    and LANES are for `statistics_of_long_row`. `ids`: how many ids of each row a program holds as well."""
    block = max(16, power_of_2(vocabulary))
    one_block = block <= LONGEST
    # Every lane has the numbers of every row: two rows of 512 logits in a warp take 26 % more instructions than a warp
    # each.
    rows = max(1, min(most_rows, 512 // block, 512 // ids)) if one_block else 1
    block, warps = (block, max(1, block // WARP_LOGITS, ids // WARP_IDS)) if one_block else (LOOPED, 4)
    vector = min(16 // itemsize, block)
    return {
        "ONE_BLOCK": one_block, "FULL": rows == 1 and vocabulary % block == 0, "ROWS": rows, "BLOCK": block,
        "VECTOR": vector, "LANES": min(32 * warps, block // vector), "num_warps": warps,
    }  # fmt: skip
