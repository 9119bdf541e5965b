"""Records what the Triton launchers launch, on tensors without storage (device "meta"), so that no GPU is needed.

`calls(op)` yields calls that together cause every kind of launch that a user's call can cause; `recorded(call)` returns
the launches of one of them, `phases(call)` also torch's own ops. mfwm_kernels.aot compiles the launches.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import autograd
from .backends import load
from .check import DTYPES
from .op import Op

META = torch.device("meta")


@dataclass(frozen=True)
class Pointer:
    """Replaces a tensor on a GPU: a launch reads only its dtype and address. nbytes counts each element once."""

    dtype: torch.dtype
    address: int
    nbytes: int = field(default=0, compare=False)

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    """kernel[(programs,)](*given, **constants), with Pointers for tensors."""

    kernel: Any
    programs: int
    given: tuple[Any, ...]
    constants: dict[str, Any]


class TorchOp(NamedTuple):
    """An op of torch's on the GPU: what it computes, and the bytes of the tensors that it reads and writes."""

    name: str
    flops: int
    nbytes: int


class Phase(NamedTuple):
    """A forward or a backward. The launches are Launch, or CudaLaunch of the cuda backend."""

    launches: list[Any]
    torch_ops: list[TorchOp]


class Call(NamedTuple):
    """A call of an op on flat arguments.

    want       which gradients are needed, by field
    upstream   the outputs' gradients, if the backward takes them: "dense"; "expanded", as the gradient of a sum is;
               "one": only the first output has one
    """

    op: Op
    name: str
    dtype: torch.dtype
    args: Any
    want: dict[str, Any]
    upstream: str = "dense"


def calls(op: Op) -> Iterator[Call]:
    """Every sample, every variant, and the sizes that are benchmarked on a GPU.

    Each runs with all gradients and with none; the first sample also with the gradients of one argument at a time.
    """
    for dtype in DTYPES:
        if dtype not in op.backends["triton"].dtypes:
            continue
        first = True
        for name, kwargs in _named(op, dtype):
            args = flat_arguments(op, kwargs)
            if op.backends["triton"].refuses(args):
                continue
            every = _want(op, args, op.differentiable)
            yield Call(op, name, dtype, args, every)
            yield Call(op, f"{name}, no gradient", dtype, args, _want(op, args, ()))
            if first:
                for field in op.differentiable:
                    if every[field]:
                        yield Call(op, f"{name}, {field} alone", dtype, args, _want(op, args, (field,)))
                for upstream in ("expanded", "one"):
                    yield Call(op, f"{name}, {upstream} upstream", dtype, args, every, upstream)
            first = False


def _want(op: Op, args: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Ask for all gradients that these fields can have."""
    leaves = autograd.flatten(op, args)[0]
    possible = autograd.nested(op, args, [leaf.is_floating_point() for leaf in leaves])
    none = autograd.nested(op, args, [False] * len(leaves))
    return {name: (possible if name in fields else none)[name] for name in op.differentiable}


def _named(op: Op, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, kwargs in enumerate(op.samples(dtype, META)):
        yield f"sample {number}", kwargs
    for number, kwargs in enumerate(op.variants(dtype, META)):
        yield f"variant {number}", kwargs
    if dtype != torch.float16:
        for size, make in op.bench.items():
            if not size.startswith("cpu"):
                yield size, make(dtype, META)
                yield f"{size}, batch 1", make(dtype, META, 1)


class _Reached(Exception):
    """Carries the flat arguments out of a public function."""


def flat_arguments(op: Op, kwargs: dict[str, Any]) -> Any:
    """The checked arguments that op.public passes to autograd.call."""

    def stop(_: Op, args: Any) -> str:
        raise _Reached(args)

    with mock.patch.object(autograd, "choose", stop):
        try:
            op.public(**kwargs)
        except _Reached as reached:
            return reached.args[0]
    raise AssertionError(f"{op.name} chose no backend")


def recorded(call: Call) -> list[Launch]:
    """The launches of a forward, and of the backward if a gradient is needed."""
    return [launch for phase in phases(call).values() for launch in phase.launches]


def phases(call: Call, backend: str = "triton") -> dict[str, Phase]:
    """What the backend does in the forward, and in the backward if a gradient is needed."""
    op, _, _, args, want, upstream = call
    found = {"forward": Phase([], [])}
    current = found["forward"]
    memory = _Memory()

    def record(launch: Any) -> None:
        current.launches.append(launch)

    with _recording(backend, memory, record):
        kernels = load(op, backend)
        with torch.no_grad():
            with _TorchOps(current.torch_ops):
                outputs, gradients = kernels.forward(args, want)
            if any(autograd.flags_of(want)):
                given = _gradients(outputs[: len(outputs) - op.statistics], upstream)
                current = found["backward"] = Phase([], [])
                with _TorchOps(current.torch_ops):
                    if op.gradients_in_forward:
                        stored = [g for g in autograd.gradient_of_leaves(want, gradients) if g is not None]
                        kernels.scale(stored, outputs[0])
                    else:
                        kernels.backward(args, want, given, outputs if op.outputs_in_backward else [])
    return found


@contextlib.contextmanager
def _recording(backend: str, memory: _Memory, record: Callable[[Any], None]) -> Iterator[None]:
    if backend == "cuda":
        from . import cuda_launches

        with cuda_launches.recording(record, memory.placed):
            yield
        return
    from .triton import launch as launcher

    def launched(kernel: Any, programs: int, given: tuple[Any, ...], constants: dict[str, Any]) -> None:
        record(Launch(kernel, programs, memory.placed(given), constants))

    launcher.recorder = launched
    try:
        yield
    finally:
        launcher.recorder = None


class _TorchOps(TorchDispatchMode):
    """Records the ops that launch something on a GPU: not views, nor allocations."""

    def __init__(self, found: list[TorchOp]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        returned = function._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device == META for tensor in (*given, *made))
        if on_gpu and not is_view and name not in WITHOUT_A_KERNEL:
            self.found.append(TorchOp(name, flops_of(name, given, made), sum(map(distinct_bytes, [*given, *made]))))
        return result


# Products of matrices, by the place of the first factor among the tensors.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
WITHOUT_A_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


def flops_of(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """Of a product of matrices; 0 of other ops."""
    return 2 * made[0].numel() * given[PRODUCTS[name]].shape[-1] if name in PRODUCTS else 0


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements, without the copies of which an expanded tensor consists."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def _gradients(outputs: list[Tensor], upstream: str) -> list[Tensor | None]:
    if upstream == "expanded":
        return [output.new_empty(()).expand_as(output) for output in outputs]
    return [torch.empty_like(o) if upstream == "dense" or i == 0 else None for i, o in enumerate(outputs)]


class _Memory:
    """Assigns addresses as a GPU's allocator does: each storage gets its own, a multiple of 512."""

    def __init__(self) -> None:
        self.free = itertools.count(1)
        # Holds the storages too: after one is freed, a new one could have the same key.
        self.placed_storages: dict[int, tuple[int, Any]] = {}

    def placed(self, value: Any) -> Any:
        """`value` with Pointers in place of its tensors."""
        if isinstance(value, tuple):
            return tuple(self.placed(entry) for entry in value)
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return Pointer(value.dtype, 0)
        storage = value.untyped_storage()
        if storage._cdata not in self.placed_storages:
            self.placed_storages[storage._cdata] = (next(self.free) << 40, storage)
        base, _ = self.placed_storages[storage._cdata]
        return Pointer(value.dtype, base + int(value.storage_offset()) * value.element_size(), distinct_bytes(value))
