"""Launches each Triton kernel through Triton's own launcher, on fake_cuda.c in place of a driver.

python launch_all.py LIBCUDA [FAULT]: prints what was launched and what was wrong with it, a JSON row per launch.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import triton.backends.nvidia.driver as nvidia
from triton.runtime import driver

from mfwm_kernels.aot_compile import Driver
from mfwm_kernels.launches import Launch, Pointer, calls, recorded
from mfwm_kernels.op import OPS

BYTES = {"CUdeviceptr": 8, **{f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}}

# What a launcher could do wrong, planted in its source.
FAULTS: dict[str, Callable[[str], str]] = {
    "": lambda source: source,
    "one too few": lambda source: source.replace("void *params[] = { &arg0,", "void *params[] = {", 1),
    "two swapped": lambda source: re.sub(r"params\[\] = { (&\w+), (&\w+),", r"params[] = { \2, \1,", source),
    "too narrow": lambda source: source.replace("int64_t arg", "int32_t arg").replace("CUdeviceptr arg", "int32_t arg"),
}


class FakeLaunch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 256),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("values", ctypes.c_uint64 * 512),
    ]


class FakeDriver(Driver):
    def __init__(self) -> None:
        super().__init__("sm_90")
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher


def kinds_of(launch: Launch) -> set[str]:
    """What the launch has for the launcher to get wrong: its kernel, and what tuples hold."""
    kinds = {launch.kernel.fn.__name__}

    def look(value: Any, inside: str) -> None:
        if isinstance(value, tuple):
            kinds.update(() if value else {"empty tuple"})
            for entry in value:
                look(entry, " in a tuple")
        elif value is None or isinstance(value, Pointer) or (isinstance(value, int) and value == 1):
            kinds.add(("pointer" if isinstance(value, Pointer) else str(value)) + inside)

    for value in launch.given:
        look(value, "")
    return kinds


def chosen() -> Iterator[Launch]:
    """Every kernel once, and everything else of kinds_of."""
    seen: set[str] = set()
    for op in OPS.values():
        if "triton" in op.backends:
            for call in calls(op):
                for launch in recorded(call):
                    if not kinds_of(launch) <= seen:
                        seen |= kinds_of(launch)
                        yield launch


def passed_by(source: str) -> list[int]:
    """The widths of the parameters that a launcher of this source passes, in bytes."""
    (declared,) = re.findall(r"static void _launch\((.*?)\) {", source)
    types = {name: kind for kind, name in re.findall(r"(\w+) (\w+)(?:,|$)", declared)}
    (given,) = re.findall(r"void \*params\[\] = { (.*?) };", source)
    return [BYTES[types[name]] for name in re.findall(r"&(\w+)", given)]


def taken_by(ptx: str) -> list[int]:
    """The widths of the parameters of the kernel itself."""
    (entry,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]


def bound(value: Any, widths: Iterator[int]) -> Iterator[int]:
    """The bits that arguments arrive as. A None and an integer 1 are compiled in; constants are no arguments here."""
    if isinstance(value, tuple):
        for entry in value:
            yield from bound(entry, widths)
    elif isinstance(value, Pointer):
        next(widths)
        yield value.address
    elif isinstance(value, float):
        next(widths)
        yield struct.unpack("<I", struct.pack("<f", value))[0]
    elif value is not None and value != 1:
        yield value % 2 ** (8 * next(widths, 8))


def wrong_with(launch: Launch, library: Any, sources: list[str]) -> list[str]:
    compiled = launch.kernel.run(*launch.given, grid=(1,), warmup=True, **launch.constants)
    widths = taken_by(compiled.asm["ptx"])
    library.fake_expect(len(widths), (ctypes.c_uint32 * len(widths))(*widths))
    before = library.fake_launches()
    # The launcher is built here, at the kernel's first launch.
    launch.kernel[(launch.programs,)](*launch.given, **launch.constants)
    if library.fake_launches() != before + 1:
        return [f"{library.fake_launches() - before} launches reached the driver"]
    seen = library.fake_last_launch().contents
    wrong = []
    if passed_by(sources[-1]) != widths:
        wrong.append(f"parameters of {passed_by(sources[-1])} bytes are passed, the kernel takes {widths}")
    shape = (seen.kernel.decode(), tuple(seen.grid), tuple(seen.block), seen.shared_bytes)
    threads, shared_bytes = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    if shape != (launch.kernel.fn.__name__, (launch.programs, 1, 1), (threads, 1, 1), shared_bytes):
        wrong.append(f"launched as {shape}")
    # The last two are Triton's scratch memory, which no kernel here has.
    want = [*bound(launch.given, iter(widths)), 0, 0]
    got = list(seen.values[: seen.parameters])
    if got != want:
        wrong.append(f"parameters arrive as {got}, given were {want}")
    return wrong


def main() -> None:
    path, *named = sys.argv[1:]
    library, fault = ctypes.CDLL(path), FAULTS[named[0] if named else ""]
    library.fake_last_launch.restype = ctypes.POINTER(FakeLaunch)
    library.fake_launches.restype = ctypes.c_uint64
    driver.set_active(FakeDriver())
    sources: list[str] = []
    make = nvidia.make_launcher

    def recorded_source(*arguments: Any) -> str:
        sources.append(fault(make(*arguments)))
        return sources[-1]

    nvidia.make_launcher = recorded_source
    # One launch shows a fault.
    for launch in itertools.islice(chosen(), 1 if named else None):
        row = {"kernel": launch.kernel.fn.__name__, "kinds": sorted(kinds_of(launch))}
        print(json.dumps({**row, "wrong": wrong_with(launch, library, sources)}), flush=True)


if __name__ == "__main__":
    main()
