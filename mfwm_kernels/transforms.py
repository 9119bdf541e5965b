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
from torch._C import _functorch
from torch.autograd import forward_ad

# Other classes, such as FakeTensor and DTensor, may have no storage to read, or more to do than an op shows.
PLAIN = (Tensor, torch.nn.Parameter)


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of flat arguments, lists followed."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif type(value) is list:
            yield from (entry for entry in value if isinstance(entry, Tensor))


def is_watched(args: Iterable[Any]) -> bool:
    """Whether torch must see the call as an op: something watches this thread (a tracer, a dispatch mode, a transform
    of torch.func, a level of forward mode), or a tensor is of a class of its own."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or _functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or any(type(tensor) not in PLAIN for tensor in tensors_of(args))
    )


def refuse_transforms(name: str, args: Iterable[Any]) -> None:
    """Raise for what kernels do not have: forward-mode derivatives and the transforms of torch.func."""
    if torch.compiler.is_compiling():
        return
    tensors = list(tensors_of(args))
    if forward_ad._current_level >= 0:
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode: backward()")
    layers = [layer for tensor in tensors for layer in layers_of(tensor)]
    if any(map(_functorch.is_batchedtensor, layers)):
        raise NotImplementedError(f"{name} does not support vmap; its inputs have a batch dimension of their own")
    if any(map(_functorch.is_gradtrackingtensor, layers)):
        raise NotImplementedError(f"{name} does not support torch.func.grad; use torch.autograd.grad")


def layers_of(tensor: Tensor) -> Iterator[Tensor]:
    """What torch.func has wrapped `tensor` in, outermost first."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = _functorch.get_unwrapped(tensor)


def resolved(args: Any) -> Any:
    """Flat arguments whose pending negations are carried out: a kernel would read the memory without the sign."""
    if not any(tensor.is_neg() for tensor in tensors_of(args)):
        return args

    def resolve(value: Any) -> Any:
        if type(value) is list:
            return [resolve(entry) for entry in value]
        return value.resolve_neg() if isinstance(value, Tensor) else value

    return type(args)(*map(resolve, args)) if hasattr(args, "_fields") else [resolve(value) for value in args]
