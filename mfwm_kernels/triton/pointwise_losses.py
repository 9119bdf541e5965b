"""The loss of an element and its derivatives, for multi_horizon_loss. NaN propagates: comparisons with it are false."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops.loss_kinds import LOG_SCALE_LIMIT

LIMIT = tl.constexpr(LOG_SCALE_LIMIT)


@triton.jit
def loss_and_gradient(difference, factor, delta, eps, KIND: tl.constexpr):
    """The loss of each element, and its derivative times `factor`."""
    size = tl.abs(difference)
    if KIND == "mse":
        loss = difference * difference
        gradient = difference * (2 * factor)
    elif KIND == "l1":
        loss = size
        gradient = signed(factor, difference)
    elif KIND == "huber":
        loss = tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * difference * difference)
        gradient = tl.where(difference > delta, delta, tl.where(difference < -delta, -delta, difference)) * factor
    else:
        loss = tl.sqrt(difference * difference + eps * eps)
        gradient = difference / loss * factor
    return loss, gradient


@triton.jit
def signed(size, difference):
    """size * sign(difference)"""
    return tl.where(difference > 0, size, tl.where(difference < 0, -size, difference * size))


@triton.jit
def likelihood_and_gradients(difference, log_scale, factor, beta, KIND: tl.constexpr):
    """The negative log-likelihood of each element, and its derivatives by mean and log-scale times `factor`."""
    s = tl.where(log_scale > LIMIT, LIMIT, tl.where(log_scale < -LIMIT, -LIMIT, log_scale))
    inverse = tl.exp(-s)
    if KIND == "gaussian":
        weight = tl.exp(beta * s)
        square = difference * difference * inverse
        loss = 0.5 * (s + square) * weight
        gradient = difference * inverse * weight * factor
        scale_gradient = 0.5 * (1 - square) * weight * factor
    else:
        size = tl.abs(difference) * inverse
        loss = s + size
        gradient = signed(inverse * factor, difference)
        scale_gradient = (1 - size) * factor
    return loss, gradient, tl.where(tl.abs(log_scale) <= LIMIT, scale_gradient, 0)
