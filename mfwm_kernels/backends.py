"""Finds the backends of this machine, and chooses one for each call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any, cast

import torch
from torch import Tensor

from . import native
from .arguments import names
from .op import Kernels, Op

BACKENDS = ("reference", "cpu", "triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(ValueError, RuntimeError):
    """A forced backend cannot serve a call: wrong name, not installed, or an option it does not have."""


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs Triton's interpreter on the CPU)"
    return ""


def _cuda_reason() -> str:
    if native.module is None:
        return native.absent
    if not native.module.has_cuda:
        return "mfwm_kernels._native was built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


class _Reasons(dict[str, str]):
    """Why a backend is absent from this machine; an empty string means that it is present.

    A reason is found on first use: asking for a CUDA device starts the driver, which takes time and forbids the
    children of a later fork to use the GPU.
    """

    def __missing__(self, backend: str) -> str:
        self[backend] = {"triton": _triton_reason, "cuda": _cuda_reason}[backend]()
        return self[backend]


ABSENT = _Reasons({"reference": "", "cpu": native.absent})

# Process-wide on purpose: torch.compile can guard on a plain global.
_forced: str = os.environ.get("MFWM_BACKEND") or "auto"


class use_backend:
    """Context manager that forces one backend for every op: `with use_backend("cpu"): ...`.

    A forced backend that cannot serve a call raises BackendError; nothing falls back. A backward runs on the backend of
    its forward. The environment variable MFWM_BACKEND, read when the package is imported, does the same for a program.

    Args:
        name: "reference", "cpu", "triton" or "cuda"; "auto" restores the automatic choice.
    """

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"name must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
        self.name = name
        self.previous: list[str] = []

    def __enter__(self) -> None:
        global _forced
        self.previous.append(_forced)
        _forced = self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self.previous.pop()


def forced() -> str | None:
    """The backend that use_backend or MFWM_BACKEND forces, or None."""
    return None if _forced == "auto" else _forced


def refusal(op: Op, backend: str, args: Any) -> str:
    """Why `backend` cannot serve this call, or ''."""
    if backend == "reference":
        return ""
    if backend not in op.backends:
        return f"{op.name} has no {backend} kernel"
    if ABSENT[backend]:
        return ABSENT[backend]
    first = first_tensor(args)
    if first.device.type not in served_devices(backend):
        return f"it serves {' and '.join(served_devices(backend))} tensors, these are on {first.device}"
    record = op.backends[backend]
    if first.dtype not in record.dtypes:
        return f"it serves {names(record.dtypes)}, not {names([first.dtype])}"
    return record.refuses(args)


def served_devices(backend: str) -> tuple[str, ...]:
    if backend == "cpu":
        return ("cpu",)
    if backend == "triton" and INTERPRETED:
        return ("cuda", "cpu")
    return ("cuda",)


def choose(op: Op, args: Any) -> str:
    """The backend that this call runs on."""
    if _forced != "auto":
        if _forced not in BACKENDS:
            raise ValueError(f"MFWM_BACKEND must be one of auto, {', '.join(BACKENDS)}; got {_forced!r}")
        reason = refusal(op, _forced, args)
        if reason:
            raise BackendError(f"backend {_forced!r} cannot serve this call of {op.name}: {reason}")
        return _forced
    first = first_tensor(args)
    device = first.device.type
    for backend, record in op.backends.items():
        if is_candidate(backend, device) and first.dtype in record.dtypes and not record.refuses(args):
            return backend
    return "reference"


def is_candidate(backend: str, device: str) -> bool:
    """Whether `auto` considers this backend on this kind of device.

    It never takes Triton's interpreter, which is for testing kernels: right, but very slow.
    """
    return device == ("cpu" if backend == "cpu" else "cuda") and not ABSENT[backend]


def first_tensor(args: Any) -> Tensor:
    """The tensor that determines the dtype and device of the call."""
    first = args[0]
    return first[0] if type(first) is list else first


def load(op: Op, backend: str) -> Kernels:
    """The module of a backend's kernels for an op, imported on first use."""
    return _module(backend, op.name)


@functools.cache
def _module(backend: str, name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(f"mfwm_kernels.{backend}.{name}"))
