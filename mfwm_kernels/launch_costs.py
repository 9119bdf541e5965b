"""The figures of a launch, of Triton or of CUDA C++: its kernel compiled for sm_90, and some warps of it run."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import cuda_launches
from .aot_compile import Variant, compile_for, key_of, resources
from .cubins import binary, name_of
from .cuda_launches import ARCHITECTURE, CudaLaunch
from .launches import Launch
from .sass.interpreter import LANES, Program
from .sass.listing import Instruction, constants_of, functions_of, instructions_of
from .sass.measure import Measures, measured
from .traffic import Argument, accesses_of, fewest_bytes


class Work(NamedTuple):
    """A kernel, and its distinct launches: (arguments, programs) of a Variant, CudaLaunch of a CUDA C++ function."""

    name: str
    kernel: Variant | str
    launches: list[Any]


def identified(op: str, call: str, launch: Launch | CudaLaunch) -> tuple[str, str, Variant | str, Any]:
    """The kernel's name, a key of its compilation, then kernel and launch as in Work. Equal launches cost the same."""
    if isinstance(launch, CudaLaunch):
        return name_of(launch.function)[1], launch.function, launch.function, launch
    name = launch.kernel.fn.__name__
    variant = Variant(op, call, (launch.kernel.fn.__module__, name), launch.given, launch.constants)
    return name, key_of(launch), variant, (arguments_of(launch), launch.programs)


def arguments_of(launch: Launch) -> tuple[Argument, ...]:
    """The arguments that the compiled kernel takes. Addresses are numbered, so that a loop's launches are equal."""
    from triton.runtime import driver

    *_, binder = launch.kernel.device_caches[driver.active.get_current_device()]
    bound, specialization, _ = binder(*launch.given, **launch.constants)
    addresses: dict[int, int] = {0: 0}
    return tuple(
        argument
        for value, (kind, _) in zip(bound.values(), specialization, strict=True)
        for argument in _flat_arguments(value, kind, addresses)
    )


def _flat_arguments(value: Any, kind: Any, addresses: dict[int, int]) -> Iterator[Argument]:
    """`kind` is Triton's name of a type, or a tuple of them."""
    if isinstance(kind, tuple):
        for entry, entry_kind in zip(value, kind, strict=True):
            yield from _flat_arguments(entry, entry_kind, addresses)
    elif kind.startswith("*"):
        address = addresses.setdefault(value.address, len(addresses) << 40 | value.address % 512)
        yield Argument(address, 8, value.nbytes)
    elif kind == "fp32":
        yield Argument(struct.unpack("<I", struct.pack("<f", value))[0], 4)
    elif kind != "constexpr":
        size = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}[kind[1:]]
        yield Argument(int(value) & (1 << 8 * size) - 1, size)


def measures_of(work: Work) -> list[dict[str, Any]]:
    """The figures of each launch. Raises what went wrong with the kernel's name in front."""
    try:
        if isinstance(work.kernel, str):
            return measures_of_cuda(work.kernel, work.launches)
        return measures_of_triton(work.kernel, work.launches)
    except Exception as error:
        raise RuntimeError(f"{work.name}: {error}") from error


def measures_of_triton(variant: Variant, launches: Sequence[tuple[tuple[Argument, ...], int]]) -> list[dict[str, Any]]:
    compiled = compile_for(ARCHITECTURE, variant)
    used = resources(compiled)
    code, constants = code_of(compiled.asm["cubin"])
    program = Program(code)
    accesses = accesses_of(compiled.asm["ttir"])
    warps = int(compiled.metadata.num_warps)
    # Triton passes two more pointers, to scratch memory that none of these kernels has.
    scratch = (Argument(0, 8), Argument(0, 8))
    rows = []
    for arguments, programs in launches:
        sized = [(argument.value, argument.size) for argument in (*arguments, *scratch)]
        found = measured(program, sized, programs, warps, used["registers"], used["shared_bytes"], constants)
        rows.append(row_of(found, *fewest_bytes(arguments, accesses), used, warps, programs))
    return rows


def measures_of_cuda(name: str, launches: Sequence[CudaLaunch]) -> list[dict[str, Any]]:
    function = cuda_launches.library().functions[name]
    program = Program(function.instructions)
    rows = []
    for launch in launches:
        used = {
            "registers": function.registers,
            "local_bytes": function.local_bytes,
            "shared_bytes": function.shared_bytes + launch.shared_bytes,
        }
        sized = [(int.from_bytes(argument, "little"), len(argument)) for argument in launch.arguments]
        warps = launch.threads // LANES
        found = measured(
            program, sized, launch.blocks, warps, used["registers"], used["shared_bytes"], function.constants
        )
        # Nothing says which of these bytes are read.
        rows.append(row_of(found, launch.nbytes, 0, used, warps, launch.blocks))
    return rows


def row_of(found: Measures, read: int, written: int, used: dict[str, int], warps: int, programs: int) -> dict[str, Any]:
    return {
        "instructions": found.warp_instructions,
        "bytes": read + written,
        "read_bytes": read,
        "flops": found.flops,
        "barriers": found.barriers,
        "loads": found.loads,
        "stores": found.stores,
        "registers": used["registers"],
        "shared_bytes": used["shared_bytes"],
        "spilled_bytes": used["local_bytes"],
        "warps": warps,
        "programs": programs,
        "blocks_per_sm": found.blocks_per_sm,
        "bytes_in_flight": found.bytes_in_flight,
        "assumed_branches": len(found.assumed),
    }


def code_of(cubin: bytes) -> tuple[list[Instruction], bytes]:
    """The instructions and the compiler's constants of a binary of one function."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def listed(option: str) -> str:
            command = [binary("cuobjdump"), option, str(file)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        (listing,) = functions_of(listed("-sass")).values()
        code = instructions_of(listing)
        # Only a switch reads such constants here, and listing them takes as long as disassembling.
        constants = constants_of(listed("-elf")) if any(found.opcode == "BRX" for found in code) else {}
    return code, b"".join(constants.values())
