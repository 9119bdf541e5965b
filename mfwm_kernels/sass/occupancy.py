"""How many blocks of a kernel an SM of an H100 or H200 (compute capability 9.0) holds at a time."""

from __future__ import annotations

# From the CUDA programming guide and NVIDIA's occupancy calculator.
WARPS = 64
BLOCKS = 32
REGISTERS = 65536
SHARED_BYTES = 228 * 1024
# What the driver reserves per block, and the unit in which an SM hands out shared memory.
RESERVED_BYTES = 1024
SHARED_UNIT = 128
# A warp's registers come in units of 256, from one of four banks.
REGISTER_UNIT = 256
SCHEDULERS = 4


def blocks_per_sm(registers: int, shared_bytes: int, warps: int) -> int:
    """0 if not even one block fits."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
    of_block = -(-(shared_bytes + RESERVED_BYTES) // SHARED_UNIT) * SHARED_UNIT
    return min(BLOCKS, WARPS // warps, warps_by_registers // warps, SHARED_BYTES // of_block)
