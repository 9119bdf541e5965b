"""The size below which one kernel computes a call whole, matrix products included (csrc/cpu/small.h)."""

from __future__ import annotations

# The most multiplications of the forward's products. Calling torch's products and the passes around them takes hundreds
# of microseconds, and so much can the kernel compute meanwhile: on a core with AVX-512 both take as long, forward and
# backward in fp32, at 2^20 multiplications in mtp_combine, 2^21 in multi_horizon_linear and more in the token loss.
MULTIPLICATIONS = 2**19


def is_small(rows: int, columns: int, depth: int) -> bool:
    """Whether the product of states [rows, depth] and heads [columns, depth] is."""
    return rows * columns * depth <= MULTIPLICATIONS
