"""Defines torch.ops.mfwm.<op> from each op's record: the op that torch.compile, torch.export and tracers see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import flops
from .autograd import (
    first_order_only,
    flatten,
    gradient_of_leaves,
    multiplied,
    nested,
    registered_backward,
    save,
    saved,
)
from .backends import load
from .dtypes import stored_dtype
from .op import Op
from .transforms import refuse_transforms

_library = torch.library.Library("mfwm", "DEF")

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[int]": "int[]",
    "list[float]": "float[]",
    "list[int] | None": "int[]?",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
}


def schema_of(op: Op) -> str:
    """The schema of the op's arguments, derived from their annotations."""
    parts = []
    for name, annotation in op.arguments.__annotations__.items():
        annotation = annotation if isinstance(annotation, str) else annotation.__forward_arg__
        if annotation not in _SCHEMA_TYPES:
            raise TypeError(
                f"{op.name}: Arguments.{name} must be annotated as one of {', '.join(_SCHEMA_TYPES)}; got {annotation}"
            )
        parts.append(f"{_SCHEMA_TYPES[annotation]} {name}")
    return ", ".join(parts)


def define(op: Op) -> None:
    """Define torch.ops.mfwm.<op>, its fake and its gradient. An op with only a reference needs none: torch traces it.

    The op takes the fields of its arguments, a flag per leaf (is its gradient needed?) and the backend. It returns the
    outputs, then the statistics or, if the forward computes gradients, the needed ones.
    """
    if not op.backends:
        return
    count = len(op.arguments.__annotations__)

    def forward(*flat: Any) -> list[Tensor]:
        args, (flags, backend) = op.arguments(*flat[:count]), flat[count:]
        want = nested(op, args, list(map(bool, flags)))
        outputs, gradients = load(op, backend).forward(args, want)
        if not op.gradients_in_forward:
            return outputs
        leaves = zip(flatten(op, args)[0], flags, gradient_of_leaves(want, gradients), strict=True)
        return [*outputs, *(laid_out_like(leaf, gradient) for leaf, flag, gradient in leaves if flag)]

    def forward_fake(*flat: Any) -> list[Tensor]:
        args, (flags, _) = op.arguments(*flat[:count]), flat[count:]
        outputs = list(op.fake(args))
        if op.gradients_in_forward:
            leaves = zip(flatten(op, args)[0], flags, strict=True)
            outputs += [torch.empty_like(leaf, dtype=stored_dtype(leaf)) for leaf, flag in leaves if flag]
        return outputs

    schema = schema_of(op)
    # Flags are int[], because torch.jit.trace does not support bool[].
    _library.define(f"{op.name}({schema}, int[] flags, str backend) -> Tensor[]")
    _library.impl(op.name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfwm::{op.name}", forward_fake, lib=_library)
    if not op.gradients_in_forward:
        _define_backward(op, schema, count)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        args, (flags, backend) = op.arguments(*inputs[:count]), inputs[count:]
        ctx.flags, ctx.backend = list(flags), backend
        gradients = output[len(output) - sum(ctx.flags) :] if op.gradients_in_forward else []
        save(ctx, op, args, output if op.outputs_in_backward else gradients)

    def autograd_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
        first_order_only(op)
        refuse_transforms(op.name, upstream)
        args, outputs = saved(ctx, op)
        if op.gradients_in_forward:
            first = upstream[0]
            assert first is not None
            scaled = iter(multiplied(outputs, first))
            leaves = zip(flatten(op, args)[0], ctx.flags, strict=True)
            gradients = nested(op, args, [next(scaled).to(leaf.dtype) if flag else None for leaf, flag in leaves])
        else:
            want = nested(op, args, ctx.flags)
            upstream = upstream[: len(upstream) - op.statistics]
            gradients = registered_backward(op, args, upstream, want, ctx.backend, outputs)
        # torch.library cannot tell an empty int[] from an empty Tensor[], and expects a list as the gradient of either.
        by_field = [gradients.get(n, [] if getattr(args, n) == [] else None) for n in args._fields]
        return (*by_field, None, None)

    torch.library.register_autograd(f"mfwm::{op.name}", autograd_backward, setup_context=setup_context, lib=_library)
    if op.counts_flops:
        _register_flops(op, count)


def _define_backward(op: Op, schema: str, count: int) -> None:
    """Define torch.ops.mfwm.<op>_backward, which returns the needed gradients, then the tensors it has written."""

    def backward(*flat: Any) -> list[Tensor]:
        args, (upstream, flags, backend, *outputs) = op.arguments(*flat[:count]), flat[count:]
        # The registered op must be functional: it writes to clones and returns them, and registered_backward copies
        # them back. A backward that computes no monitor figures returns the clones unchanged.
        written = {n: getattr(args, n).clone() for n in op.mutated_in_backward if getattr(args, n) is not None}
        args = args._replace(**written)
        want = nested(op, args, list(map(bool, flags)))
        gradients = load(op, backend).backward(args, want, upstream, outputs[0] if outputs else [])
        return [g for g in gradient_of_leaves(want, gradients) if g is not None] + list(written.values())

    def backward_fake(*flat: Any) -> list[Tensor]:
        args, (_, flags, *_) = op.arguments(*flat[:count]), flat[count:]
        leaves = [leaf for leaf, flag in zip(flatten(op, args)[0], flags, strict=True) if flag]
        written = [getattr(args, n) for n in op.mutated_in_backward if getattr(args, n) is not None]
        return [*(leaf.new_empty(leaf.shape) for leaf in leaves), *(torch.empty_like(w) for w in written)]

    extra = "Tensor?[] upstream, int[] flags, str backend" + (", Tensor[] outputs" if op.outputs_in_backward else "")
    _library.define(f"{op.name}_backward({schema}, {extra}) -> Tensor[]")
    _library.impl(f"{op.name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfwm::{op.name}_backward", backward_fake, lib=_library)


def laid_out_like(leaf: Tensor, gradient: Tensor | None) -> Tensor:
    """`gradient` in the strides of torch.empty_like(leaf), which the fake promises to the compiler. None, for a tensor
    whose gradient is summed where it is given first, is zeros."""
    if gradient is None:
        return torch.zeros_like(leaf, dtype=stored_dtype(leaf))
    expected = torch.empty_like(leaf, device="meta").stride()
    return gradient if gradient.stride() == expected else torch.empty_like(leaf, dtype=gradient.dtype).copy_(gradient)


def _register_flops(op: Op, count: int) -> None:
    """Have FlopCounterMode count the op's cost, of which a third is its forward's."""

    def forward_flops(*flat: Any, **_: Any) -> int:
        with_gradients = op.gradients_in_forward and any(flat[count])
        return op.cost(op.arguments(*flat[:count])._asdict()).flops // (1 if with_gradients else 3)

    def backward_flops(*flat: Any, **_: Any) -> int:
        return 2 * op.cost(op.arguments(*flat[:count])._asdict()).flops // 3

    flops.register(getattr(torch.ops.mfwm, op.name), forward_flops)
    if not op.gradients_in_forward:
        flops.register(getattr(torch.ops.mfwm, f"{op.name}_backward"), backward_flops)
