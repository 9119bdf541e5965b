"""What a launch costs by its machine code: instructions, barriers, widths of accesses, bytes in flight."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .interpreter import LANES, Constants, Program, Run
from .listing import Instruction
from .occupancy import blocks_per_sm

# Where a kernel's arguments start in bank 0, on compute capability 9.0.
FIRST_ARGUMENT = 0x210
# No more warps are run after this many instructions: about a second.
ENOUGH_INSTRUCTIONS = 500_000
# Multiples of it, modulo 1, spread evenly however many there are.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Measures:
    """Instructions and FLOPs are of all warps of a launch, the rest per warp or SM, averaged over the warps that ran.

    assumed  addresses of branches that depend on what memory holds (interpreter.py says how they are resolved): not
             empty means that the counts are an estimate
    """

    warp_instructions: float
    flops: float
    barriers: float
    loads: dict[int, float]
    stores: dict[int, float]
    blocks_per_sm: int
    bytes_in_flight: float
    assumed: tuple[int, ...]


def arguments_at(constants: Constants, arguments: Iterable[tuple[int, int]]) -> None:
    """Place (value, size in bytes) arguments where the compiler expects them, each aligned to its size, 8 at most."""
    offset = FIRST_ARGUMENT
    for value, size in arguments:
        alignment = min(size, 8)
        offset = -(-offset // alignment) * alignment
        constants.put(offset, value, size)
        offset += size


def measured(
    program: Program,
    arguments: Sequence[tuple[int, int]],
    blocks: int,
    warps: int,
    registers: int,
    shared_bytes: int,
    compiler_constants: bytes = b"",
) -> Measures:
    """Run some warps of a launch. `arguments` are (value, size in bytes)."""
    constants = Constants(blocks, warps * LANES, compiler_constants)
    arguments_at(constants, arguments)
    runs: list[Run] = []
    # Blocks at the ends of a tensor do less. Run more of them unless the first ones all did the same.
    for enough in (4, max(8, warps), 32):
        runs += [program.run(constants, int((i * GOLDEN) % 1 * blocks), i % warps) for i in range(len(runs), enough)]
        is_uniform = enough > 4 and len({tuple(run.counts) for run in runs}) == 1
        if is_uniform or sum(sum(run.counts) for run in runs) > ENOUGH_INSTRUCTIONS:
            break
    resident = blocks_per_sm(registers, shared_bytes, warps)
    of_warp = [sum(column) / len(runs) for column in zip(*(run.counts for run in runs), strict=True)]
    return Measures(
        warp_instructions=sum(of_warp) * warps * blocks,
        flops=sum(count * flops_of(i) for i, count in zip(program.instructions, of_warp, strict=True)) * warps * blocks,
        barriers=sum(c for i, c in zip(program.instructions, of_warp, strict=True) if i.opcode == "BAR"),
        loads=histogram(program.instructions, of_warp, "is_global_load"),
        stores=histogram(program.instructions, of_warp, "is_global_store"),
        blocks_per_sm=resident,
        bytes_in_flight=resident * warps * bytes_in_flight(runs),
        assumed=tuple(sorted({program.instructions[place].address for run in runs for place in run.assumed})),
    )


def histogram(instructions: Sequence[Instruction], counts: Sequence[float], kind: str) -> dict[int, float]:
    """How many accesses of each width in bytes per lane."""
    found: Counter[int] = Counter()
    for instruction, count in zip(instructions, counts, strict=True):
        if count and getattr(instruction, kind):
            found[instruction.width] += count  # type: ignore[assignment]
    return dict(sorted(found.items(), reverse=True))


def bytes_in_flight(runs: Sequence[Run]) -> float:
    """The bytes outstanding when a warp waits for a load, averaged over the bytes that it waits for."""
    waits = [wait for run in runs for wait in run.waits]
    arriving = sum(wait.arriving for wait in waits)
    return sum(wait.arriving * wait.outstanding for wait in waits) / arriving if arriving else 0.0


def flops_of(instruction: Instruction) -> float:
    """The FLOPs of a tensor-core instruction per warp. Four warps execute an HGMMA together."""
    if instruction.warpgroup_shape is not None:
        return 2 * math.prod(instruction.warpgroup_shape) / 4
    packed = next((re.fullmatch(r"(\d{2})(\d)(\d+)", word) for word in instruction.modifiers if word.isdigit()), None)
    if instruction.opcode == "HMMA" and packed:
        m, n, k = map(int, packed.groups())
        return 2.0 * m * n * k
    return 0.0
