"""The size below which one kernel computes a call whole, matrix products included (csrc/cpu/small.h)."""

from __future__ import annotations

# The most multiplications in the forward's products. Calling torch's products and the passes around them takes hundreds
# of microseconds however small they are. On a core with AVX-512 the kernel loses its lead, forward and backward in
# fp32, at 2^20 multiplications in mtp_combine, 2^21 in multi_horizon_linear and later in the token loss.
MULTIPLICATIONS = 2**19


def is_small(rows: int, columns: int, depth: int) -> bool:
    """Whether one kernel should compute the product of states [rows, depth] and heads [columns, depth]."""
    return rows * columns * depth <= MULTIPLICATIONS
