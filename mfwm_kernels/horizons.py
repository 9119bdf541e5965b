"""Which frames are predicted from a position, at what size, and which predictions count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import INTEGER_IDS, LARGEST, integer, integers, shape, tensor


@dataclass(frozen=True)
class Horizons:
    """The K predictions made from one position.

    Args:
        offsets: frames ahead, non-decreasing integers >= 0 (0: a MaskGIT-style model predicts the masked frame n
            itself).
        factors: how much smaller each target is, integers >= 1; an offset may repeat, with increasing factors.

    >>> Horizons.cascade(4)
    Horizons(offsets=(1, 2, 4, 8), factors=(1, 2, 4, 8))
    """

    offsets: tuple[int, ...]
    factors: tuple[int, ...]

    def __post_init__(self) -> None:
        offsets = integers("offsets", self.offsets, least=0, most=None)
        factors = integers("factors", self.factors, least=1, most=None)
        if not offsets:
            raise ValueError("offsets must name at least one horizon, got ()")
        if len(factors) != len(offsets):
            raise ValueError(f"factors must have one entry per offset: offsets {offsets}, factors {factors}")
        check_non_decreasing(offsets)
        for i in range(1, len(offsets)):
            if offsets[i] == offsets[i - 1] and factors[i] <= factors[i - 1]:
                raise ValueError(
                    f"factors must increase where an offset repeats: factors[{i}] = {factors[i]} does not exceed "
                    f"factors[{i - 1}] = {factors[i - 1]} at offset {offsets[i]}"
                )
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "factors", factors)

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def labels(self) -> tuple[str, ...]:
        """The offset of each horizon as its name in logs and plots, with the factor where several share an offset.

        >>> Horizons.multi_resolution().labels
        ('1@1/1', '1@1/2', '1@1/4', '2', '4')
        """
        pairs = zip(self.offsets, self.factors, strict=True)
        return tuple(str(k) if self.offsets.count(k) == 1 else f"{k}@1/{f}" for k, f in pairs)

    def valid(
        self,
        i: int,
        positions: int,
        frames: int,
        segment_ids: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """[B, positions] bool: where horizon i counts in a clip of `frames` frames.

        Args:
            i: the horizon.
            positions: T, of the hidden state.
            frames: T_v, of the clip.
            segment_ids: [B, frames] int32 or int64. None: all frames are in one segment, and the result is
                [1, positions] on `device`.
            device: of the result, without segment_ids.
        """
        i, positions = integer("i", i, least=0, most=len(self) - 1), integer("positions", positions, least=0)
        frames = integer("frames", frames, least=0)
        if segment_ids is None:
            return valid_at(self.offsets[i], positions, frames, None, 1, device)
        tensor("segment_ids", segment_ids, 2, "[B, frames]", INTEGER_IDS)
        shape("segment_ids", segment_ids, (segment_ids.shape[0], frames), "[B, frames]")
        return valid_at(self.offsets[i], positions, frames, segment_ids, segment_ids.shape[0], segment_ids.device)

    @classmethod
    def next_frame(cls) -> Horizons:
        """Only the next frame: ((1,), (1,))."""
        return cls((1,), (1,))

    @classmethod
    def low_res(cls, offsets: Sequence[int] = (1, 2, 4, 8), factor: int = 4) -> Horizons:
        """The near horizon at full resolution, and every far one at 1/factor of it."""
        offsets, factor = integers("offsets", offsets), integer("factor", factor, least=1)
        return cls(offsets, (1,) + (factor,) * (len(offsets) - 1))

    @classmethod
    def cascade(cls, count: int = 4) -> Horizons:
        """`count` horizons, each twice as far as the last and half its size: ((1, 2, 4, 8), (1, 2, 4, 8)) for 4."""
        count = integer("count", count, least=1)
        powers = tuple(2**i for i in range(count))
        return cls(powers, powers)

    @classmethod
    def multi_resolution(cls, factors_of_offset: Mapping[int, Sequence[int]] | None = None) -> Horizons:
        """Each offset at several factors; by default {1: (1, 2, 4), 2: (2,), 4: (4,)}."""
        if factors_of_offset is None:
            factors_of_offset = {1: (1, 2, 4), 2: (2,), 4: (4,)}
        if not isinstance(factors_of_offset, Mapping):
            raise TypeError(
                f"factors_of_offset must map offsets to lists of factors, got {type(factors_of_offset).__name__}"
            )
        integers("factors_of_offset", tuple(factors_of_offset), least=0)
        for offset, factors in factors_of_offset.items():
            if not isinstance(factors, Sequence):
                raise TypeError(
                    f"factors_of_offset must map offsets to lists of factors, got {factors!r} for offset {offset!r}"
                )
        pairs = [(offset, factor) for offset, factors in sorted(factors_of_offset.items()) for factor in factors]
        return cls(tuple(offset for offset, _ in pairs), tuple(factor for _, factor in pairs))


def check_horizons(value: object) -> None:
    if not isinstance(value, Horizons):
        raise TypeError(f"horizons must be a Horizons, got {type(value).__name__}")
    for name, numbers in (("offsets", value.offsets), ("factors", value.factors)):
        if max(numbers) > LARGEST:
            raise ValueError(f"horizons.{name} must be <= {LARGEST} for a kernel, got {numbers}")


def check_non_decreasing(offsets: Sequence[int]) -> None:
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(
                f"offsets must not decrease: offsets[{i}] = {offsets[i]} after offsets[{i - 1}] = {offsets[i - 1]}"
            )


def valid_at(offset: int, positions: int, frames: int, segment_ids: Tensor | None, batch: int, device) -> Tensor:
    """[batch, positions] bool: position n counts if n + offset < frames and both frames are in one segment.

    This is the library's only validity rule; kernels repeat it in registers and are tested against it.
    """
    inside = max(0, min(positions, frames - offset))
    if segment_ids is not None:
        in_one = segment_ids[:, :inside] == segment_ids[:, offset : offset + inside]
        if inside == positions:
            return in_one
    valid = torch.zeros(batch, positions, dtype=torch.bool, device=device)
    valid[:, :inside] = True if segment_ids is None else in_one
    return valid


def consistency_pairs(count: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """The (near, far) pairs that consistency weights of this shape apply to: (0, j) for [K], all i < j for [K, K]."""
    if len(shape) == 1:
        return [(0, j) for j in range(1, count)]
    return [(i, j) for i in range(count) for j in range(i + 1, count)]
