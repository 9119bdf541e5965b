"""Run the CUDA C++ kernels on the CPU, to test values and out-of-bounds accesses without a GPU.

`emulated_module()` compiles csrc/bindings.cpp, csrc/cuda and the emulator with g++ into a module like
mfwm_kernels._native. Within `emulated_cuda`, the cuda backend runs it on CPU tensors through the usual launchers.
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
    *('-DMFWM_SIGNATURES=""', '-DMFWM_CUDA_VERSION=""', '-DMFWM_CUDA_ARCHITECTURES=""', '-DMFWM_SIMD_LEVELS=""'),
]
# Faults that a GPU would trap, or that no kernel should have, raise an illegal instruction, which the emulator reports.
TRAPS = [
    "-fsanitize=alignment,bounds,null,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]
BUILT = ROOT / "build" / "cuda_emulator"


def build(suffix: str, parts: list[Path], command: list[str]) -> Path:
    """The file that `command` builds from `parts`, cached under a hash of the command and their contents."""
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
            return build(".o", [source, *headers, *cuda_headers], ["g++", *FLAGS, *TRAPS, "-x", "c++", "-c"])
        return build(".o", [source, *headers], ["g++", *FLAGS, "-c"])

    units = [sources / "bindings.cpp", *sorted(sources.glob("cuda/*.cu")), HERE / "emulator.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    # Leave csrc/cpu out: with lazy binding its functions need not exist, because nothing calls them.
    return build(".so", objects, ["g++", "-shared", "-Wl,-z,lazy"])


@functools.cache
def emulated_module(sources: Path = ROOT / "csrc") -> ModuleType:
    path = compile_module(sources)
    # pybind11 caches modules by their full name, so each needs its own. Python looks for PyInit_ plus the last part.
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
    """Allocates each tensor between two inaccessible pages.

    The tensor touches one of the pages with its "start" (and is then aligned as on a GPU) or with its "end", so that an
    access beyond it ends the emulated launch. An "unaligned" tensor is one element away from the start. The remaining
    space is filled with NaN, and `check` asserts that it still is.
    """

    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.allocated: list[tuple[mmap.mmap, int, int, int]] = []

    def empty_like(self, like: Tensor) -> Tensor:
        """A tensor of the shape, strides and dtype of `like`, filled with NaN (255 or -1 for integers)."""
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
        self.allocated.append((memory, first, used, room))
        flat = torch.frombuffer(memory, dtype=like.dtype, count=span, offset=first)
        return flat.as_strided(like.shape, like.stride())

    def copy(self, value: Any) -> Any:
        """A copy of `value` with its tensors between fences, with the same strides; also inside lists."""
        if isinstance(value, (list, tuple)) and any(isinstance(entry, Tensor) for entry in value):
            return [self.copy(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        # copy_ refuses to write an element of stride 0 more than once.
        once = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
        return self.empty_like(once).copy_(once).expand(value.shape)

    def check(self) -> None:
        for memory, first, used, room in self.allocated:
            around = memory[PAGE:first] + memory[first + used : PAGE + room]
            assert around == b"\xff" * len(around), "a kernel wrote outside a tensor"


@contextlib.contextmanager
def emulated_cuda(fences: Fences, module: ModuleType | None = None) -> Iterator[None]:
    """Run the cuda backend on CPU tensors. It allocates between fences, and memory is NaN until a kernel writes it."""

    def fenced(allocate: Any) -> Any:
        return lambda *args, **kwargs: fences.empty_like(allocate(*args, **kwargs))

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
