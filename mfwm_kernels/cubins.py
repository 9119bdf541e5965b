"""What the CUDA tools in Triton's wheel say of compiled kernels."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path


def binary(name: str) -> str:
    """The path of a CUDA tool that Triton's wheel contains."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def resource_usage(file: Path) -> list[str]:
    """The lines of cuobjdump on the kernels in a cubin, an object or a library."""
    command = [binary("cuobjdump"), "--dump-resource-usage", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def usage_of(line: str) -> dict[str, int]:
    """What a line of `resource_usage` says: registers per thread, and bytes of local and shared memory."""
    used = {name: int(value) for name, value in re.findall(r"(REG|LOCAL|STACK|SHARED):(\d+)", line)}
    # Spilled registers are in the stack frame; LOCAL counts only declared local memory.
    return {
        "registers": used["REG"],
        "local_bytes": used["LOCAL"] + used["STACK"],
        "shared_bytes": used["SHARED"],
    }


def name_of(mangled: str) -> tuple[str, str, str]:
    """(file without .cu, kernel, template arguments as the compiler writes them) of a function in a .cu file."""
    match = re.search(r"GLOBAL__N__\w{8}_\d+_(\w+?)_cu_\w{8}_?\w*?\d+([a-z]\w*?)(?:I(\w+?)EEv|E)", mangled)
    return match.groups("") if match else ("", mangled, "")  # type: ignore[return-value]
