"""The CUDA C++ kernels run on the CPU, for values and out-of-bounds accesses where there is no GPU.

`emulated_module()` compiles csrc/bindings.cpp, csrc/cuda and the emulator with g++ into a module like
mfwm_kernels._native. `emulated_cuda` makes the cuda backend serve CPU tensors through it, by its own launchers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

import mfwm_kernels.cuda
from mfwm_kernels import backends

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-DMFWM_WITH_CUDA"),
    *('-DMFWM_CUDA_VERSION=""', '-DMFWM_CUDA_ARCHITECTURES=""', '-DMFWM_SIMD_LEVELS=""'),
]
# What a GPU traps, or what no kernel should do, becomes an illegal instruction, which the emulator reports.
TRAPS = [
    "-fsanitize=alignment,bounds,null,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]
BUILT = ROOT / "build" / "cuda_emulator"


def made(suffix: str, parts: list[Path], command: list[str]) -> Path:
    """The file that `command` makes of `parts`, kept by what they hold."""
    contents = b"".join(part.read_bytes() for part in parts)
    path = BUILT / (hashlib.sha256(repr((command, sys.version)).encode() + contents).hexdigest()[:24] + suffix)
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*command, *map(str, parts[:1] if suffix == ".o" else parts), "-o", str(unfinished)], check=True)
        unfinished.rename(path)
    return path


def compile_module(sources: Path) -> Path:
    """The module of `sources`, a csrc folder."""
    headers = sorted([*sources.glob("*.h"), *HERE.glob("*.h")], key=lambda path: path.name)
    cuda_headers = sorted(sources.glob("cuda/*.cuh"), key=lambda path: path.name)

    def compiled(source: Path) -> Path:
        if source.suffix == ".cu":
            return made(".o", [source, *headers, *cuda_headers], ["g++", *FLAGS, *TRAPS, "-x", "c++", "-c"])
        return made(".o", [source, *headers], ["g++", *FLAGS, "-c"])

    units = [sources / "bindings.cpp", *sorted(sources.glob("cuda/*.cu")), HERE / "emulator.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    # csrc/cpu is left out: its names are bound when they are called, which is never.
    return made(".so", objects, ["g++", "-shared", "-Wl,-z,lazy"])


@functools.cache
def emulated_module(sources: Path = ROOT / "csrc") -> ModuleType:
    path = compile_module(sources)
    # pybind11 keeps modules by their full name, and Python looks for PyInit_ with the last part.
    name = f"{path.stem}._native"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    finally:
        sys.setdlopenflags(flags)


PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Fences:
    """Tensors in memory of their own, between two inaccessible pages.

    A tensor touches one of them, by its "start" (then it is aligned as a GPU's) or its "end", and an access beyond
    ends the emulated launch. Or it lies "unaligned", one element from the start. The rest of the room is filled with
    NaN, and `check` sees whether it still is.
    """

    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.kept: list[tuple[mmap.mmap, int, int, int]] = []

    def empty_like(self, like: Tensor) -> Tensor:
        """Of the shape, strides and dtype of `like`, filled with NaN (255, -1)."""
        if like.numel() == 0:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        steps = zip(like.shape, like.stride(), strict=True)
        span = sum((size - 1) * stride for size, stride in steps) + 1
        used = span * like.itemsize
        room = -(-(used + like.itemsize) // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)
        first = {"start": PAGE, "end": PAGE + room - used, "unaligned": PAGE + like.itemsize}[self.edge]
        memory[PAGE : PAGE + room] = b"\xff" * room
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + PAGE + room):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.kept.append((memory, first, used, room))
        flat = torch.frombuffer(memory, dtype=like.dtype, count=span, offset=first)
        return flat.as_strided(like.shape, like.stride())

    def copy(self, value: Any) -> Any:
        """Tensors moved between fences, with their strides; lists followed."""
        if isinstance(value, (list, tuple)) and any(isinstance(entry, Tensor) for entry in value):
            return [self.copy(entry) for entry in value]
        return self.empty_like(value).copy_(value) if isinstance(value, Tensor) else value

    def check(self) -> None:
        for memory, first, used, room in self.kept:
            around = memory[PAGE:first] + memory[first + used : PAGE + room]
            assert around == b"\xff" * len(around), "a kernel wrote beside a tensor"


@contextlib.contextmanager
def emulated_cuda(fences: Fences, module: ModuleType | None = None) -> Iterator[None]:
    """The cuda backend on CPU tensors. What it allocates stands between fences and is NaN until a kernel writes it."""

    def fenced(make: Any) -> Any:
        return lambda *args, **kwargs: fences.empty_like(make(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.ABSENT, "cuda", "")
        patch.setattr(backends, "served_devices", lambda backend: ("cuda", "cpu"))
        patch.setattr(mfwm_kernels.cuda, "kernels", module or emulated_module())
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch, "empty", fenced(torch.empty))
        patch.setattr(torch, "empty_like", fenced(torch.empty_like))
        yield
    fences.check()
