"""Argument checks that the ops share. Every error names the argument, the rule and the value.

They run before anything is launched, read only shapes, dtypes, devices and Python numbers, and torch.compile can trace
them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_IDS = (torch.int32, torch.int64)
# The largest int that kernels take.
LARGEST = 2**31 - 1
LARGEST_FLOAT = sys.float_info.max


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def tensor(
    name: str, value: Any, rank: int | tuple[int, ...], letters: str, dtypes: Sequence[torch.dtype] = FLOATING
) -> Tensor:
    """Check that `value` is a dense tensor of one of these ranks, whose shape `letters` spells, and of these dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind is not Tensor and kind is not Parameter and kind.__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a torch.Tensor, got a DTensor, of which this rank holds a part. Under FSDP2, apply "
            f"fully_shard to the module whose forward calls the op, not to the one that only owns {name}; or pass "
            f"{name}.full_tensor()"
        )
    ranks = (rank,) if isinstance(rank, int) else rank
    if value.dim() not in ranks:
        dimensions = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {dimensions} dimensions, {letters}; got shape {shape_of(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {names(dtypes)}, got {names([value.dtype])}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    return value


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that `value` has the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {names([other.dtype])}; got {names([value.dtype])}"
        )
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Check that `value` has exactly this shape, which `meaning` spells in letters, such as [B, T, D]."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {list(expected)}, got {shape_of(value)}")


def non_zero_sizes(name: str, value: Tensor, may_be_zero: Sequence[int] = (0, 1)) -> None:
    """Check that no size is zero, except in the dimensions listed (batch and time, where empty inputs are valid)."""
    for axis, size in enumerate(value.shape):
        if axis not in may_be_zero and size == 0:
            raise ValueError(f"{name} must not have size 0 in dimension {axis}, got shape {shape_of(value)}")


def common_divisors(*sizes: int) -> str:
    """The integers that divide all sizes, for an error about one that does not."""
    largest = math.gcd(*sizes)
    divisors = [str(n) for n in range(1, largest + 1) if largest % n == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def grid_sizes(value: Any) -> tuple[int, int]:
    """The rows and columns (Hp, Wp) of a grid."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"grid must be a pair of integers (Hp, Wp), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"grid must be a pair of integers (Hp, Wp), got {value!r}")
    height, width = integers("grid", value, least=1)
    return height, width


def grid(value: Any, name: str, tokens: Tensor) -> tuple[int, int]:
    """The rows and columns (Hp, Wp) of tokens [B, T, S, ...] in row order: S = Hp * Wp."""
    height, width = grid_sizes(value)
    if height * width != tokens.shape[2]:
        raise ValueError(
            f"grid must have Hp * Wp = {tokens.shape[2]}, the tokens of a frame of {name} (shape {shape_of(tokens)}); "
            f"got {height} x {width}"
        )
    return height, width


def is_integer(value: Any) -> bool:
    # Fast path: isinstance with numbers.Integral, an ABC, takes many times as long as an exact type check.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def integers(
    name: str, values: Any, *, least: int | None = None, most: int | None = LARGEST, count: int | None = None
) -> tuple[int, ...]:
    """A sequence of `count` Python integers, each between `least` and `most`."""
    # Fast path: isinstance with Sequence, an ABC, takes many times as long as an exact type check.
    if type(values) not in (list, tuple) and (isinstance(values, (str, bytes)) or not isinstance(values, Sequence)):
        raise TypeError(f"{name} must be a sequence of integers, got {type(values).__name__}")
    for i, value in enumerate(values):
        if type(value) is not int and not is_integer(value):
            raise TypeError(f"{name}[{i}] must be an integer, got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name}[{i}] must be >= {least}, got {value}")
        if most is not None and value > most:
            raise ValueError(f"{name}[{i}] must be <= {most}, got {value}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} must have one entry per horizon, {count}; got {len(values)}")
    return tuple(map(int, values))


def number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """A finite Python number, at least `least` or greater than `above`."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Not math.isfinite: under torch.compile with dynamic shapes the number may be symbolic. Compare before float(),
    # which raises OverflowError for larger integers.
    magnitude: Any = abs(value)
    if not magnitude <= LARGEST_FLOAT:
        raise ValueError(f"{name} must be finite, got {value}")
    value = float(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above}, got {value}")
    return value


def integer(name: str, value: Any, *, least: int, most: int = LARGEST) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be <= {most}, got {value}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def device(name: str, value: Any) -> torch.device | None:
    """A device, or what torch.device takes; None for torch's default."""
    try:
        return None if value is None else torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a device of torch, got {value!r}") from error


def choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    try:
        if value in choices:
            return value
    except (RuntimeError, ValueError):  # of arrays, whose == is no bool
        pass
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def tensors(name: str, values: Any, count: int | None, rank: int | tuple[int, ...], letters: str) -> list[Tensor]:
    """A list or tuple of floating tensors, one per horizon."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(values).__name__}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} must have one entry per horizon, {count}; got {len(values)}")
    return [tensor(f"{name}[{i}]", value, rank, letters) for i, value in enumerate(values)]


def horizon_weights(name: str, value: Any, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Weights as an fp32 or fp64 tensor, or as (nested) lists of finite numbers, of one of these shapes.

    A tensor must be on the device of `like`; lists become a tensor there.
    """
    meaning = " or ".join(str(list(s)) for s in shapes)
    if isinstance(value, Tensor):
        tensor(name, value, tuple({len(s) for s in shapes}), meaning, (torch.float32, torch.float64))
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {meaning}, got {shape_of(value)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on the device of the inputs, {like.device}; got {value.device}")
        return value
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of numbers, got {type(value).__name__}")
    rows = value if value and isinstance(value[0], (list, tuple)) else [value]
    for row in rows:
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"{name} must be a list of numbers or a list of such lists, got {value!r}")
        for number_in_row in row:
            number(f"{name} entry", number_in_row)
    size = (len(value),) if rows[0] is value else (len(value), len(rows[0]))
    if size not in shapes or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{name} must have shape {meaning}, got {value!r}")
    return constant(tuple(entry for row in rows for entry in row), size, like)


def has_data(tensor: Tensor) -> bool:
    """True for plain tensors and parameters. Subclasses such as FakeTensor and DTensor may have no storage to read."""
    return type(tensor) in (Tensor, Parameter)


def constant(values: tuple[float, ...], size: tuple[int, ...], like: Tensor) -> Tensor:
    """The numbers as an fp64 tensor on the device of `like`, cached: never write to it.

    Building one costs about 2% of a loss on a CPU. On a GPU it costs a launch per number, because no call may wait for
    a copy from the host. Calls captured in a CUDA graph use the tensors that earlier calls cached.
    """
    device = like.device
    if torch.compiler.is_compiling() or not has_data(like):
        # Under torch.compile, or with a fake tensor, the constant belongs to that trace: never cache it.
        return _filled(values, size, device)
    key = (values, size, device)
    cached = _constants.get(key)
    if cached is not None:
        return cached.ready()
    # Autograd cannot save a tensor created in inference mode, and a later call may need to.
    with torch.inference_mode(False):
        filled = _filled(values, size, device)
    # A tensor computed during capture is in the graph's memory pool, so do not cache it.
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not captured and len(_constants) < 1024 and _outlives_modes(filled):
        _constants[key] = Shared(filled)
    return filled


class Shared:
    """A tensor that one GPU stream writes once, and that calls on any stream read later."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.written = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def ready(self) -> Tensor:
        """The tensor, for use on the current stream, which waits for the write if necessary. The host never waits."""
        # A capture cannot query or wait for an event from outside it. It need not: it replays long after the write.
        if self.written is not None and not torch.cuda.is_current_stream_capturing():
            if self.written.query():
                self.written = None
            else:
                torch.cuda.current_stream(self.tensor.device).wait_event(self.written)
        return self.tensor


_constants: dict[tuple[tuple[float, ...], tuple[int, ...], torch.device], Shared] = {}


def _outlives_modes(tensor: Tensor) -> bool:
    """Whether the tensor has data of its own: a FakeTensor or a wrapper of torch.func ends with its mode."""
    try:
        return has_data(tensor) and tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _filled(values: tuple[float, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.float64, device=device).view(size)
    # One fill per number, because a copy from the host would wait.
    entries = [torch.full((), value, dtype=torch.float64, device=device) for value in values]
    return torch.stack(entries).view(size)


def segments(
    value: Any, batch: int, columns: int, column_meaning: str, other_name: str, other: Tensor
) -> Tensor | None:
    """`segment_ids` [B, columns], int32 or int64, or None."""
    if value is None:
        return None
    letters = f"[B, {column_meaning}]"
    tensor("segment_ids", value, 2, letters, INTEGER_IDS)
    shape("segment_ids", value, (batch, columns), letters)
    same_device("segment_ids", value, other_name, other)
    return value
