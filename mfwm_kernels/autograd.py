"""Calls an op: chooses its backend and connects its gradients to autograd.

In eager mode `call` goes straight to an autograd.Function, because a registered op costs tens of microseconds more.
Under torch.compile, and where torch watches or transforms the call (transforms.py), it goes through
`torch.ops.mfwm.<name>` (torch_library.py). The compiler traces through the `reference` backend, which is plain PyTorch.

autograd.Function and torch.library take flat lists, whose order only this file and torch_library.py know: a *leaf* is a
differentiable tensor of the arguments, field after field, with lists flattened and None left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose, load
from .op import Gradients, Op, Want
from .transforms import is_batched, prepare, refuse_compiled_forward_mode, refuse_transforms


def call(op: Op, args: Any) -> list[Tensor]:
    """Run `op` on checked arguments; the outputs are those of `op.reference`."""
    if torch.compiler.is_compiling():
        # The compiler must always see the registered op.
        watched = True
        refuse_compiled_forward_mode(op.name)
    else:
        args, watched = prepare(args, op.tensor_fields)
    backend = choose(op, args)
    leaves, want, needed = flatten(op, args, torch.is_grad_enabled())
    if watched:
        if backend == "reference":
            outputs = list(op.reference(args))
        else:
            refuse_transforms(op.name, args)
            flags = flags_of(want)
            flat = getattr(torch.ops.mfwm, op.name).default(*args, flags, backend)
            outputs = list(flat[: len(flat) - (sum(flags) if op.gradients_in_forward else op.statistics)])
        return [outputs[0], *(o.detach() for o in outputs[1:])] if op.gradients_in_forward else outputs
    if not needed and backend == "reference":
        return list(op.reference(args))
    if not needed:
        outputs = load(op, backend).forward(args, want)[0]
        return outputs[: len(outputs) - op.statistics]
    function = _Reference if backend == "reference" else _Kernel
    return list(function.apply(op, backend, args, want, *leaves))


def flatten(op: Op, args: Any, grad: bool = True) -> tuple[list[Tensor], dict[str, Any], bool]:
    """The leaves, which of their gradients are needed (none if `grad` is False), and whether any is."""
    leaves: list[Tensor] = []
    want: dict[str, Any] = {}
    needed = False
    for name in op.differentiable:
        value = getattr(args, name)
        if value is None:
            want[name] = None
        elif type(value) is list:
            leaves += value
            want[name] = flags = [grad and entry.requires_grad for entry in value]
            needed = needed or True in flags
        else:
            leaves.append(value)
            want[name] = flag = grad and value.requires_grad
            needed = needed or flag
    return leaves, want, needed


def flags_of(want: Want) -> list[bool]:
    """`want` as one bool per leaf."""
    flags: list[bool] = []
    for needs in want.values():
        if needs is not None:
            flags += needs if type(needs) is list else [needs]
    return flags


def nested(op: Op, args: Any, values: Sequence[Any]) -> dict[str, Any]:
    """One value per leaf as a dict by field: a list for a list of tensors, None for a field that is None."""
    rest = iter(values)
    fields: dict[str, Any] = {}
    for name in op.differentiable:
        value = getattr(args, name)
        if value is None:
            fields[name] = None
        else:
            fields[name] = [next(rest) for _ in value] if type(value) is list else next(rest)
    return fields


def gradient_of_leaves(want: Want, gradients: Gradients) -> list[Tensor | None]:
    """Gradients by field as one entry per leaf, None where none is needed."""
    flat: list[Tensor | None] = []
    for name, needs in want.items():
        if type(needs) is list:
            flat += gradients[name] if True in needs else [None] * len(needs)
        elif needs is not None:
            flat.append(gradients[name] if needs else None)
    return flat


def first_order_only(op: Op) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op.name} has no second derivative: call backward without create_graph=True")


class _Reference(torch.autograd.Function):
    """The reference, differentiated by autograd on a separate graph: first order only, like every backend."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: str, args: Any, want: Want, *leaves: Tensor) -> tuple[Tensor, ...]:
        flags = flags_of(want)
        with torch.enable_grad():
            inner_leaves = [leaf.detach().requires_grad_(flag) for leaf, flag in zip(leaves, flags, strict=True)]
            outputs = op.reference(args._replace(**nested(op, args, inner_leaves)))
        ctx.op, ctx.flags = op, flags
        ctx.inputs = [leaf for leaf, flag in zip(inner_leaves, flags, strict=True) if flag]
        ctx.outputs = outputs
        ctx.set_materialize_grads(False)
        detached = tuple(output.detach() for output in outputs)
        if op.gradients_in_forward:
            ctx.mark_non_differentiable(*detached[1:])
        return detached

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        first_order_only(ctx.op)
        pairs = [(o, g) for o, g in zip(ctx.outputs, grads, strict=True) if g is not None and o.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(ctx.inputs)
        if pairs:
            outputs, upstream = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, ctx.inputs, upstream, retain_graph=True, allow_unused=True)
        if any(grad is not None for grad in grads):
            # An input that no output depends on gets zeros, as it does from the kernels.
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(ctx.inputs, gradients, strict=True)]
        rest = iter(gradients)
        return (None, None, None, None, *(next(rest) if flag else None for flag in ctx.flags))


class _Kernel(torch.autograd.Function):
    """A backend's forward and backward."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: str, args: Any, want: Want, *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs, gradients = load(op, backend).forward(args, want)
        ctx.op, ctx.backend, ctx.want = op, backend, want
        if op.gradients_in_forward:
            ctx.gradients = gradient_of_leaves(want, gradients)
            ctx.dtypes = [leaf.dtype for leaf in leaves]
            ctx.mark_non_differentiable(*outputs[1:])
        save(ctx, op, args, outputs if op.outputs_in_backward else ())
        ctx.set_materialize_grads(False)
        return tuple(outputs[: len(outputs) - op.statistics])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, want = ctx.op, ctx.want
        first_order_only(op)
        if op.gradients_in_forward:
            return (None, None, None, None, *_scaled(ctx, grads[0]))
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(flags_of(want)))
        grads, watched = prepare(grads, range(len(grads)))
        if watched or is_batched(grads):
            refuse_transforms(op.name, grads)
        args, outputs = saved(ctx, op)
        if watched:
            gradients = registered_backward(op, args, list(grads), want, ctx.backend, outputs)
        else:
            gradients = load(op, ctx.backend).backward(args, want, grads, outputs)
        return (None, None, None, None, *gradient_of_leaves(want, gradients))


def _scaled(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """The gradients that the forward computed, times that of the first output, one entry per leaf.

    The first backward scales the stored gradients in place and releases them; a second one recomputes them.
    """
    op, dtypes = ctx.op, ctx.dtypes
    if upstream is None:
        return [None] * len(dtypes)
    (upstream,), watched = prepare((upstream,), (0,))
    if watched or is_batched((upstream,)):
        refuse_transforms(op.name, (upstream,))
    kernels = load(op, ctx.backend)
    stored, ctx.gradients = ctx.gradients, None
    if stored is None:
        stored = gradient_of_leaves(ctx.want, kernels.forward(saved(ctx, op)[0], ctx.want)[1])
    needed = [gradient for gradient in stored if gradient is not None]
    scaled = iter(multiplied(needed, upstream) if watched else kernels.scale(needed, upstream))
    gradients: list[Tensor | None] = []
    for i, old in enumerate(stored):
        gradient = None if old is None else next(scaled)
        # Without a test Tensor.to takes a microsecond to find that there is nothing to convert.
        gradients.append(gradient if gradient is None or gradient.dtype == dtypes[i] else gradient.to(dtypes[i]))
    return gradients


# Placeholder for a tensor that autograd saves; for a list of tensors it is their number.
_SAVED = object()


def save(ctx: Any, op: Op, args: Any, outputs: Sequence[Tensor]) -> None:
    """Save the tensors of `args`, and `outputs`, through autograd, and the rest of `args` on ctx.

    Autograd raises if a saved tensor was changed in place before a backward reads it. Tensors that the backward itself
    writes are therefore stored on ctx: every backward may overwrite them.
    """
    tensors: list[Tensor] = []
    rest = list(args)
    for field in op.saved_fields:
        value = rest[field]
        if isinstance(value, Tensor):
            tensors.append(value)
            rest[field] = _SAVED
        elif value:
            tensors += value
            rest[field] = len(value)
    ctx.rest = rest
    ctx.save_for_backward(*tensors, *outputs)


def saved(ctx: Any, op: Op) -> tuple[Any, list[Tensor]]:
    """The saved arguments and outputs."""
    tensors = iter(ctx.saved_tensors)
    fields = list(ctx.rest)
    for field in op.saved_fields:
        value = fields[field]
        if value is _SAVED:
            fields[field] = next(tensors)
        elif value:
            fields[field] = list(itertools.islice(tensors, value))
    return op.arguments(*fields), list(tensors)


def multiplied(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients * upstream, in fp32 (fp64 for fp64): a loss scale may not be representable in the gradients' dtype."""
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * upstream for gradient in gradients]


def scale_in_place(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, skipped on the CPU if upstream is 1. The `scale` of backends without a kernel for it."""
    if upstream.is_cpu:
        factor = upstream.item()
        return gradients if factor == 1 else [gradient.mul_(factor) for gradient in gradients]
    return [gradient.mul_(upstream) for gradient in gradients]


def registered_backward(
    op: Op, args: Any, upstream: list[Tensor | None], want: Want, backend: str, outputs: Sequence[Tensor]
) -> Gradients:
    """The needed gradients, computed through the registered op."""
    flags = flags_of(want)
    backward_op = getattr(torch.ops.mfwm, f"{op.name}_backward").default
    returned = backward_op(*args, upstream, flags, backend, *([outputs] if op.outputs_in_backward else []))
    targets = [getattr(args, name) for name in op.mutated_in_backward if getattr(args, name) is not None]
    count = sum(flags)
    for target, value in zip(targets, returned[count:], strict=True):
        target.copy_(value)
    rest = iter(returned[:count])
    return nested(op, args, [next(rest) if flag else None for flag in flags])
