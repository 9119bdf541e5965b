"""Records what the CUDA C++ launchers launch, and the kernels' machine code, without a GPU.

`library()` compiles csrc/bindings.cpp and csrc/cuda for sm_90 with nvcc, together with a stand-in for the CUDA runtime
that hands each launch to a callback. Within `recording`, the launchers run on tensors without storage.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from .cubins import binary, usage_of
from .native import CODES
from .sass.listing import Instruction, constants_of, functions_of, instructions_of
from .sass.occupancy import RESERVED_BYTES

SOURCES = Path(__file__).parent.parent / "csrc"
BUILT = Path(__file__).parent.parent / "build" / "aot"
ARCHITECTURE = "sm_90"


class CudaLaunch(NamedTuple):
    """A launch of `function`, a name in machine code; its arguments' bytes; `nbytes` that it moves at least."""

    function: str
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[bytes, ...]
    nbytes: int


@dataclass
class Function:
    """A kernel's machine code. `constants` are the compiler's, in bank 2; `shared_bytes` are static."""

    listing: str = ""
    argument_bytes: list[int] = field(default_factory=list)
    constants: bytes = b""
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0

    # Parsed on first use: the library has many times the functions that a report launches.
    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        return instructions_of(self.listing)


class Library(NamedTuple):
    module: ModuleType
    path: Path
    functions: dict[str, Function]


def absent() -> str:
    """Why the CUDA C++ kernels cannot be compiled here, or ''."""
    if not (SOURCES / "cuda").is_dir():
        return f"{SOURCES} is not there"
    missing = [program for program in ("nvcc", "g++") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


@functools.cache
def library() -> Library:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    empty = [f'-DMFWM_{name}=""' for name in ("SIGNATURES", "CUDA_VERSION", "CUDA_ARCHITECTURES", "SIMD_LEVELS")]
    macros = ["-DMFWM_WITH_CUDA", *empty]
    nvcc = ["nvcc", "-std=c++17", "-O3", f"-arch={ARCHITECTURE}", "--cudart=none", "--no-compress"]
    nvcc += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
    kernels = [_built(nvcc, source) for source in sorted(SOURCES.glob("cuda/*.cu"))]
    host = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *includes, *macros, "-c"]
    objects = [_built(host, SOURCES / "bindings.cpp"), _built(nvcc, SOURCES / "aot" / "runtime.cpp"), *kernels]
    # With lazy binding the functions of csrc/cpu need not exist, because nothing calls them.
    path = _built(["g++", "-shared", "-Wl,-z,lazy"], *objects, suffix=".so")
    functions: dict[str, Function] = {}
    for kernel in kernels:
        functions |= _functions_of(kernel)
    return Library(_imported(path), path, functions)


def _built(command: list[str], *parts: Path, suffix: str = ".o") -> Path:
    """The output of `command` on `parts`, cached under a hash of the command and of all that it may read."""
    read = parts if suffix == ".so" else (*parts, *sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("cuda/*.cuh")))
    digest = hashlib.sha256(repr((command, sys.version)).encode() + b"".join(part.read_bytes() for part in read))
    path = BUILT / (digest.hexdigest()[:24] + suffix)
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*command, *map(str, parts), "-o", str(unfinished)], check=True)
        unfinished.rename(path)
    return path


def _imported(path: Path) -> ModuleType:
    # pybind11 caches modules by their full name, so each needs its own. Python looks for PyInit_ plus the last part.
    loader = importlib.machinery.ExtensionFileLoader(f"{path.stem}._native", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    finally:
        sys.setdlopenflags(flags)


def _functions_of(compiled: Path) -> dict[str, Function]:
    def listed(*options: str) -> str:
        command = [binary("cuobjdump"), *options, str(compiled)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    found = {name: Function(listing) for name, listing in functions_of(listed("-sass")).items()}
    name = ""
    for line in listed("--dump-resource-usage").splitlines():
        if line.strip().startswith("Function "):
            name = line.split()[1].rstrip(":")
        elif "REG:" in line and name in found:
            for resource, value in usage_of(line).items():
                setattr(found[name], resource, value)
    sections = listed("-elf")
    for name, constants in constants_of(sections).items():
        found[name].constants = constants
    sizes: dict[str, dict[int, int]] = {}
    for line in sections.splitlines():
        heading = re.match(r"\.(?:nv\.info\.(\S+)\s*$)?", line)
        if heading:
            name = heading[1] or ""
        elif name:
            argument = re.search(r"Ordinal : (0x\w+)\s+Offset\s+: 0x\w+\s+Size\s+: (0x\w+)", line)
            if argument:
                sizes.setdefault(name, {})[int(argument[1], 16)] = int(argument[2], 16)
    for function in found.values():
        # The driver's part is listed too.
        function.shared_bytes = max(0, function.shared_bytes - RESERVED_BYTES)
    for name, by_ordinal in sizes.items():
        found[name].argument_bytes = [by_ordinal[ordinal] for ordinal in sorted(by_ordinal)]
    return found


@contextlib.contextmanager
def recording(record: Callable[[CudaLaunch], None], placed: Callable[[Tensor], Any]) -> Iterator[None]:
    """Run the launchers of the cuda backend on tensors without storage, and hand their launches to `record`.

    `placed` gives the mfwm_kernels.launches.Pointer of a tensor.
    """
    from . import cuda
    from .cuda import multi_horizon_loss, video_pyramid
    from .ops import multi_horizon_loss as loss_arguments

    built = library()
    moved = 0

    def raw(tensor: Tensor | None) -> Any:
        nonlocal moved
        if tensor is None:
            return None
        pointer = placed(tensor)
        moved += pointer.nbytes
        return pointer.address, CODES[tensor.dtype], tensor.shape, tensor.stride()

    def launched(name: bytes, blocks: int, threads: int, shared_bytes: int, pointers: Any) -> None:
        nonlocal moved
        function = name.decode()
        sizes = built.functions[function].argument_bytes
        arguments = tuple(ctypes.string_at(pointers[place], size) for place, size in enumerate(sizes))
        nbytes = 0
        # The kernels that count and finish move next to nothing.
        if not re.search(r"(count|finish)_kernel", function):
            # Scaling reads and writes its tensors.
            nbytes, moved = moved * (2 if "scale_kernel" in function else 1), 0
        record(CudaLaunch(function, blocks, threads, shared_bytes, arguments, nbytes))

    signature = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
    )
    callback = signature(launched)
    stand_in = ctypes.CDLL(str(built.path), mode=os.RTLD_LAZY)
    stand_in.mfwm_record_launches(callback)
    with contextlib.ExitStack() as patches:
        for module in (multi_horizon_loss, video_pyramid, loss_arguments):
            patches.enter_context(mock.patch.object(module, "raw", raw))
        patches.enter_context(mock.patch.object(cuda, "kernels", built.module))
        patches.enter_context(mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()))
        stream = SimpleNamespace(cuda_stream=0)
        patches.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device: stream))
        try:
            yield
        finally:
            stand_in.mfwm_record_launches(signature(0))
