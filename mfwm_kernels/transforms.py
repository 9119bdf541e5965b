"""What torch attaches to a tensor or to the thread beside data: tracers, modes, transforms, pending negation.

A kernel reads and writes memory that these do not see. Where one is active, a call goes through the registered op,
which torch traces, fakes and functionalises like its own; forward-mode derivatives and vmap are refused by the op's
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

# Classes of flat arguments that hold no tensor; a list that begins with a number holds numbers.
PLAIN = frozenset({int, float, bool, str, torch.dtype})


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of flat arguments, lists followed."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif type(value) is list:
            yield from (entry for entry in value if isinstance(entry, Tensor))


def settle(args: Any) -> tuple[Any, bool]:
    """Flat arguments with pending negations carried out, since a kernel would read the memory without the sign; and
    whether torch must see the call as an op.

    It must where something watches this thread (a tracer, a dispatch mode, a transform of torch.func, a level of
    forward mode), or where a tensor is of a class of its own. One pass in plain loops: every eager call pays for it.
    """
    watched = is_thread_watched()
    negated = False
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            negated |= value.is_neg()
        elif kind in PLAIN:
            continue
        elif kind is list:
            if value and type(value[0]) in PLAIN:
                continue
            for entry in value:
                kind = type(entry)
                if kind is Tensor or kind is Parameter:
                    negated |= entry.is_neg()
                elif isinstance(entry, Tensor):
                    watched = True
        elif isinstance(value, Tensor):
            # FakeTensor, DTensor and others may have no storage to read, or more to do than an op shows.
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
    """Raise for what kernels do not have: forward-mode derivatives and the transforms of torch.func."""
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
    """Whether these are upstream gradients of autograd.grad(is_grads_batched=True), which no thread state tells of."""
    return any(_functorch.is_legacy_batchedtensor(grad) for grad in grads if grad is not None)


def refuse_compiled_forward_mode(name: str) -> None:
    """While a call is compiled no tangent can be seen, and the op would drop it."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); compile it outside of forward mode")


def layers_of(tensor: Tensor) -> Iterator[Tensor]:
    """What torch.func has wrapped `tensor` in, outermost first."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = _functorch.get_unwrapped(tensor)
