"""python -m mfwm_kernels.aot [--arch sm_80 sm_90 sm_100] [--json FILE]: registers and spills of every GPU kernel.

The launchers of each op run at the op's benchmark sizes on tensors without storage (device "meta"), in fp32 and bf16,
forward and backward; what they would launch is compiled instead, with the specialisation that those arguments get.
Registers, local memory (spills) and shared memory are read from the cubin; those of the CUDA C++ kernels from the
compiled module, where it was built with nvcc. No GPU is needed. Exit status 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import registry
from .check import converted, tensors_of
from .registry import OPS, Op, leaves_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float32)
META = torch.device("meta")


class _Driver:
    """Stands for a GPU of one architecture where Triton asks what to compile for."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # A kernel remembers, per device, what it compiled for it.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(op: Op) -> Iterator[tuple[str, torch.dtype]]:
    for size in op.bench:
        for dtype in DTYPES:
            if dtype in op.backends["triton"].dtypes:
                yield size, dtype


def arguments_of(op: Op, size: str, dtype: torch.dtype) -> Any:
    """The flat arguments of a call at a benchmark size, whose differentiable tensors want gradients."""
    seen: list[Any] = []
    kwargs = op.bench[size](dtype, META)
    kwargs = {
        name: converted(value, lambda t: t.detach().requires_grad_()) if name in op.differentiable else value
        for name, value in kwargs.items()
        if name != "grad_monitor"
    }

    def remember(_: Op, args: Any) -> str:
        seen.append(args)
        return "reference"

    with mock.patch.object(registry, "choose", remember):
        op.public(**kwargs)
    return seen[0]


def launches(op: Op, size: str, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, constants) of everything that a forward and a backward launch."""
    from .triton import launch as launcher

    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    args = arguments_of(op, size, dtype)
    wanted = [leaf.requires_grad for leaf in leaves_of(op, args)]
    module = registry.load(op, "triton")
    launcher.instead = lambda kernel, given, constants: recorded.append((kernel, given, constants))
    try:
        with torch.no_grad():
            outputs, extras = module.forward(args, wanted)
            if op.gradients_in_forward:
                getattr(module, "scale", registry.scale_in_place)(extras, outputs[0])
            elif any(wanted):
                given = [outputs] if op.outputs_in_backward else []
                module.backward(args, wanted, [torch.empty_like(output) for output in outputs], *given)
    finally:
        launcher.instead = None
    return iter(recorded)


def compile_for(architecture: str, kernel: Any, given: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """The compiled kernel, specialised as a launch with these arguments would be."""
    from triton.runtime import driver

    driver.set_active(_Driver(architecture))
    compiled = kernel.run(*given, grid=(1,), warmup=True, **constants)
    assert compiled.metadata.target.arch == int(architecture.removeprefix("sm_"))
    return compiled


def binary(name: str) -> str:
    """A CUDA tool of Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def resources(compiled: Any, folder: str) -> dict[str, int]:
    """Registers per thread and bytes of local and shared memory."""
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (used,) = (usage_of(line) for line in listing(cubin) if "REG:" in line)
    # Triton allots shared memory at launch, where the cubin does not see it.
    return {**used, "shared_bytes": int(compiled.metadata.shared)}


def listing(file: Path) -> list[str]:
    command = [binary("cuobjdump"), "--dump-resource-usage", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def usage_of(line: str) -> dict[str, int]:
    used = {name: int(value) for name, value in re.findall(r"(REG|LOCAL|STACK|SHARED):(\d+)", line)}
    # Spilled registers lie in the stack frame; LOCAL counts what is declared beside it.
    return {
        "registers": used["REG"],
        "local_bytes": used["LOCAL"] + used["STACK"],
        "shared_bytes": used["SHARED"],
    }


def cuda_rows(architecture: str) -> Iterator[dict[str, Any]]:
    """The CUDA C++ kernels in the compiled module. Their shared memory is what is declared, not what a launch adds."""
    if registry.native is None or not registry.native.has_cuda:
        return
    found = function = ""
    for line in listing(Path(registry.native.__file__ or "")):
        if line.startswith("arch = "):
            found = line.removeprefix("arch = ").strip()
        elif line.strip().startswith("Function "):
            function = line.split()[1].rstrip(":")
        elif "REG:" in line and found == architecture:
            source, kernel, arguments = name_of(function)
            row = {"kernel": kernel, "op": source, "arch": architecture, "size": "", "config": arguments}
            yield {**row, **usage_of(line)}


def name_of(mangled: str) -> tuple[str, str, str]:
    """(file without .cu, kernel, template arguments as the compiler writes them) of a function in a .cu file."""
    match = re.search(r"GLOBAL__N__\w{8}_\d+_(\w+?)_cu_\w{8}_?\w*?\d+([a-z]\w*?)(?:I(\w+?)EEv|E)", mangled)
    return match.groups("") if match else ("", mangled, "")  # type: ignore[return-value]


def config_of(given: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """What tells two compilations of a kernel apart: dtypes, then the constants."""
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors_of(given)})
    return " ".join([*dtypes, *(f"{name}={value}".replace(" ", "") for name, value in constants.items())])


def rows_of(op: Op, architecture: str, folder: str) -> Iterator[dict[str, Any]]:
    seen = set()
    for size, dtype in cases(op):
        for kernel, given, constants in launches(op, size, dtype):
            name, config = kernel.fn.__name__, config_of(given, constants)
            if (name, config) in seen:
                continue
            seen.add((name, config))
            compiled = compile_for(architecture, kernel, given, constants)
            row = {"kernel": name, "op": op.name, "arch": architecture, "size": size, "config": config}
            yield {**row, **resources(compiled, folder)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfwm_kernels.aot", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="ARCH")
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS), metavar="OP")
    parser.add_argument("--json", metavar="FILE", help="keep the rows in FILE")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")

    rows = []
    print(f"{'kernel':30} {'op':20} {'arch':7} {'size':10} {'dtypes':28} registers   local  shared (bytes)")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in arguments.arch:
            chosen = [OPS[name] for name in arguments.op]
            compiled = (row for op in chosen if "triton" in op.backends for row in rows_of(op, architecture, folder))
            built = (row for row in cuda_rows(architecture) if row["op"] in arguments.op)
            for row in itertools.chain(compiled, built):
                rows.append(row)
                dtypes = " ".join(word for word in row["config"].split() if "=" not in word)
                print(
                    f"{row['kernel']:30} {row['op']:20} {row['arch']:7} {row['size']:10} {dtypes:28} "
                    f"{row['registers']:9} {row['local_bytes']:7} {row['shared_bytes']:7}",
                    flush=True,
                )
    spilling = [row for row in rows if row["local_bytes"] > 0]
    print(f"{len(rows)} compiled, {len(spilling)} spill")
    for row in spilling:
        print(f"SPILLS {row['kernel']} of {row['op']} on {row['arch']}: {row['local_bytes']} bytes, {row['config']}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()
