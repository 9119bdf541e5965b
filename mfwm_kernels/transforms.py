"""Finds what a kernel would bypass: tracers, dispatch modes, transforms of torch.func, pending negations.

A kernel reads and writes memory, which none of them can see. If one is active, the call goes through the registered op,
which torch traces, fakes and functionalises like its own ops. Forward-mode derivatives and vmap raise an error that
names the op.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.nn import Parameter


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of flat arguments, including those in lists."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif type(value) is list:
            yield from (entry for entry in value if isinstance(entry, Tensor))


def prepare(args: Any, fields: Iterable[int]) -> tuple[Any, bool]:
    """Flat arguments with pending negations resolved, and whether torch must see the call as an op.

    `fields` are the indices of those that may be a tensor or a list of tensors. A kernel reads memory, which lacks the
    sign of a pending negation. Torch must see the call if something watches this thread (a tracer, a dispatch mode, a
    transform of torch.func, a level of forward mode), or if a tensor is of a subclass. One pass in plain loops, because
    every eager call pays for it.
    """
    watched = is_thread_watched()
    negated = False
    for field in fields:
        value = args[field]
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            negated |= value.is_neg()
        elif kind is list:
            for entry in value:
                kind = type(entry)
                if kind is Tensor or kind is Parameter:
                    negated |= entry.is_neg()
                elif isinstance(entry, Tensor):
                    watched = True
        elif isinstance(value, Tensor):
            # FakeTensor, DTensor and other subclasses may have no storage to read, or may need to act on the op.
            watched = True
    return (resolved(args) if negated else args), watched


def is_thread_watched() -> bool:
    return (
        _len_torch_dispatch_stack() > 0
        or _is_tracing()
        or _functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def resolved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.resolve_neg()
    if hasattr(value, "_fields"):
        return type(value)(*map(resolved, value))
    return [resolved(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def refuse_transforms(name: str, args: Iterable[Any]) -> None:
    """Raise for what kernels do not support: forward-mode derivatives and the transforms of torch.func."""
    if torch.compiler.is_compiling():
        return
    tensors = list(tensors_of(args))
    if forward_ad._current_level >= 0:
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode: backward()")
    layers = [layer for tensor in tensors for layer in layers_of(tensor)]
    if any(map(_functorch.is_batchedtensor, layers)) or is_batched(tensors):
        raise NotImplementedError(f"{name} does not support vmap; its inputs have a batch dimension of their own")
    if any(map(_functorch.is_gradtrackingtensor, layers)):
        raise NotImplementedError(f"{name} does not support torch.func.grad; use torch.autograd.grad")


def is_batched(grads: Iterable[Tensor | None]) -> bool:
    """Whether these come from autograd.grad(is_grads_batched=True), which leaves no trace in the thread's state."""
    return any(_functorch.is_legacy_batchedtensor(grad) for grad in grads if grad is not None)


def refuse_compiled_forward_mode(name: str) -> None:
    """Raise in forward mode: compilation hides the tangents, so the compiled op would drop them."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); compile it outside of forward mode")


def layers_of(tensor: Tensor) -> Iterator[Tensor]:
    """The wrappers that torch.func has put around a tensor, outermost first."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = _functorch.get_unwrapped(tensor)
