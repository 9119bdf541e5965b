"""What the Triton launchers launch: recorded on tensors without storage (device "meta"), so no GPU is needed.

`calls(op)` are calls whose launches are, between them, every kind that a user's call leads to; `recorded(call)` are the
launches of one of them. mfwm_kernels.aot compiles these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import registry
from .check import DTYPES, tensors_of
from .registry import Op, leaves_of

META = torch.device("meta")


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor on a GPU: all that a launch takes from one are its dtype and its address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    """kernel[(programs,)](*given, **constants), with Pointers for tensors."""

    kernel: Any
    programs: int
    given: tuple[Any, ...]
    constants: dict[str, Any]


class Call(NamedTuple):
    """A call by its flat arguments.

    wanted     which leaves want a gradient
    upstream   the outputs' gradients, where the backward takes them: "dense"; "expanded", as those of a sum are; "one",
               where only the first output has any
    """

    op: Op
    name: str
    dtype: torch.dtype
    args: Any
    wanted: list[bool]
    upstream: str = "dense"


def calls(op: Op) -> Iterator[Call]:
    """Every sample, every option that the samples leave out, and the sizes that are benchmarked on a GPU.

    Each with all gradients and with none; the first sample also with those of one argument at a time.
    """
    for dtype in DTYPES:
        if dtype not in op.backends["triton"].dtypes:
            continue
        first = True
        for name, kwargs in _named(op, dtype):
            args = flat_arguments(op, kwargs)
            if op.backends["triton"].refuses(args):
                continue
            leaves = leaves_of(op, args)
            possible = [leaf.is_floating_point() for leaf in leaves]
            yield Call(op, name, dtype, args, possible)
            yield Call(op, f"{name}, no gradient", dtype, args, [False] * len(leaves))
            if first:
                for field in op.differentiable:
                    wanted = [entry for f in op.differentiable for entry in [f == field] * _count(args, f)]
                    if any(wanted):
                        yield Call(op, f"{name}, {field} alone", dtype, args, wanted)
                for upstream in ("expanded", "one"):
                    yield Call(op, f"{name}, {upstream} upstream", dtype, args, possible, upstream)
            first = False


def _count(args: Any, field: str) -> int:
    """How many leaves a field has."""
    return len(tensors_of(getattr(args, field)))


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
    """What op.public passes on, once it has checked its arguments."""

    def stop(_: Op, args: Any) -> str:
        raise _Reached(args)

    with mock.patch.object(registry, "choose", stop):
        try:
            op.public(**kwargs)
        except _Reached as reached:
            return reached.args[0]
    raise AssertionError(f"{op.name} chose no backend")


def recorded(call: Call) -> list[Launch]:
    """What a forward launches, and the backward where a gradient is wanted."""
    from .triton import launch as launcher

    op, _, _, args, wanted, upstream = call
    launches: list[Launch] = []
    memory = _Memory()

    def record(kernel: Any, programs: int, given: tuple[Any, ...], constants: dict[str, Any]) -> None:
        launches.append(Launch(kernel, programs, memory.placed(given), constants))

    module = registry.load(op, "triton")
    launcher.instead = record
    try:
        with torch.no_grad():
            outputs, extras = module.forward(args, wanted)
            if not any(wanted):
                pass
            elif op.gradients_in_forward:
                getattr(module, "scale", registry.scale_in_place)(extras, outputs[0])
            else:
                given = [outputs] if op.outputs_in_backward else []
                module.backward(args, wanted, _gradients(outputs, upstream), *given)
    finally:
        launcher.instead = None
    return launches


def _gradients(outputs: list[Tensor], upstream: str) -> list[Tensor | None]:
    if upstream == "expanded":
        return [output.new_empty(()).expand_as(output) for output in outputs]
    return [torch.empty_like(o) if upstream == "dense" or i == 0 else None for i, o in enumerate(outputs)]


class _Memory:
    """Deals out addresses as a GPU's allocator does: to each storage its own, a multiple of 512."""

    def __init__(self) -> None:
        self.free = itertools.count(1)
        # Storages are kept: another one at the same place in Python's memory would pass for this one.
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
        begin, _ = self.placed_storages[storage._cdata]
        return Pointer(value.dtype, begin + int(value.storage_offset()) * value.element_size())
