"""What the token-loss kernels share: rows of logits with bias and softcap, and powers of 2."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import IN_INTERPRETER

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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
        z = z / softcap
        square = z * z
        # An odd polynomial near 0, where 1 - 2 / (exp(2 z) + 1) would lose digits to cancellation.
        p = -5.70498872745e-3 * square + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        e = tl.exp(-2 * tl.abs(z))
        large = (1 - e) / (1 + e)
        large = tl.where(z < 0, -large, large)
        z = softcap * tl.where(tl.abs(z) < 0.625, z + z * square * p, large)
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
