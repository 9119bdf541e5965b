"""Token ids that are out of range: an error on every device, without waiting for one.

On the CPU the call raises. On a GPU the kernel's verdict is copied asynchronously to pinned memory, and the next op
call, or `check_errors()`, raises. In either case an id that is out of range is never used as an index.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One pinned record per device: [how many, the first one's value, its place in the flattened tokens, vocabulary].
_records: dict[torch.device, Tensor] = {}
# The same on the device: a clean call must not wipe out the report of an earlier one that nobody has read yet.
_sticky: dict[torch.device, Tensor] = {}


def checked_ids(tokens: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """`tokens` as int64, with `ignore_index` in place of ids that are not in [0, vocabulary)."""
    return torch.ops.mfwm.checked_ids(tokens, vocabulary, ignore_index)


def check_errors() -> None:
    """Wait for the GPUs' work so far and raise for any out-of-range id that it met."""
    for device in list(_records):
        torch.cuda.synchronize(device)
    raise_pending()


def raise_pending() -> None:
    """Raise for what has been reported so far, without waiting."""
    for device, record in _records.items():
        if record[0]:
            count, value, place, vocabulary = record.tolist()
            record.zero_()
            _sticky[device].zero_()
            raise ValueError(
                f"tokens must be in [0, {vocabulary}) or ignore_index: an earlier call on {device} met {count} "
                f"that are not, the first {value} at flat index {place}"
            )


def _checked_ids(tokens: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    ids = tokens.long()
    bad = ((ids < 0) | (ids >= vocabulary)) & (ids != ignore_index)
    if tokens.device.type == "cpu":
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"tokens must be in [0, {vocabulary}) or ignore_index = {ignore_index}; "
                f"tokens{place} = {ids[tuple(place)]}"
            )
        return ids.clone() if ids is tokens else ids
    if tokens.numel():
        record = _records.setdefault(tokens.device, torch.zeros(4, dtype=torch.int64).pin_memory())
        first = bad.flatten().int().argmax()
        count = bad.sum()
        verdict = torch.stack([count, ids.flatten().take(first), first, torch.full_like(count, vocabulary)])
        sticky = _sticky.setdefault(tokens.device, torch.zeros(4, dtype=torch.int64, device=tokens.device))
        sticky.copy_(torch.where(count > 0, verdict, sticky))
        record.copy_(sticky, non_blocking=True)
    return ids.masked_fill(bad, ignore_index)


_library = torch.library.Library("mfwm", "FRAGMENT")
_library.define("checked_ids(Tensor tokens, int vocabulary, int ignore_index) -> Tensor")
_library.impl("checked_ids", _checked_ids, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mfwm::checked_ids", lambda tokens, *_: torch.empty_like(tokens, dtype=torch.int64), lib=_library
)
