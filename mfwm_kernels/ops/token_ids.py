"""Token ids that are out of range: an error on every device, without waiting for one.

On the CPU the call raises. On a GPU the kernel's verdict is copied asynchronously to pinned memory, and the next op
call, or `check_errors()`, raises. In either case an id that is out of range is never used as an index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Shared


@dataclass
class _Report:
    """What the calls on one GPU have met so far; only the device writes it, so nothing reported is lost or repeated.

    found     [2, 4] on the device: how many bad ids in all, then one of them, its place in the flattened tokens and the
              vocabulary. The second row takes what calls without a bad id write.
    pinned    the first row, copied to the host after every call
    raised    how many of them an error has reported
    """

    found: Shared
    pinned: Tensor
    raised: int = 0


_reports: dict[torch.device, _Report] = {}


def checked_ids(tokens: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """`tokens` as int64, with `ignore_index` in place of ids that are not in [0, vocabulary)."""
    return torch.ops.mfwm.checked_ids(tokens, vocabulary, ignore_index)


def check_errors() -> None:
    """Wait for the GPUs' work so far and raise for any out-of-range id that it met."""
    for device in list(_reports):
        torch.cuda.synchronize(device)
    raise_pending()


def raise_pending() -> None:
    """Raise for what has been reported so far, without waiting."""
    for device, report in _reports.items():
        count, value, place, vocabulary = report.pinned.tolist()
        if count > report.raised:
            new, report.raised = count - report.raised, count
            raise ValueError(
                f"tokens must be in [0, {vocabulary}) or ignore_index: an earlier call on {device} met {new} "
                f"that are not, such as {value} at flat index {place}"
            )


def _report_of(device: torch.device) -> _Report:
    report = _reports.get(device)
    if report is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"multi_horizon_linear_cross_entropy must run once on {device} before it is captured in a CUDA graph: "
                "it allocates pinned memory then, which capture does not allow"
            )
        found = Shared(torch.zeros(2, 4, dtype=torch.int64, device=device))
        report = _reports[device] = _Report(found, torch.zeros(4, dtype=torch.int64, device="cpu").pin_memory())
    return report


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
    if tokens.device.type == "cuda" and tokens.numel():
        report = _report_of(tokens.device)
        found = report.found.ready()
        write(found, ids, bad, vocabulary)
        report.pinned.copy_(found[0], non_blocking=True)
    return ids.masked_fill(bad, ignore_index)


def write(found: Tensor, ids: Tensor, bad: Tensor, vocabulary: int) -> None:
    """Add a call's bad ids to `found`. Calls on several streams may overlap: the count is added atomically, and a call
    without bad ids leaves the details alone."""
    count = bad.sum().view(1)
    place = bad.flatten().int().argmax().view(1)
    details = torch.stack([ids.flatten()[place], place, torch.full_like(place, vocabulary)], 1)
    found[:, 1:].index_copy_(0, (count == 0).long(), details)
    found[:, 0].index_add_(0, torch.zeros_like(place), count)


_library = torch.library.Library("mfwm", "FRAGMENT")
_library.define("checked_ids(Tensor tokens, int vocabulary, int ignore_index) -> Tensor")
_library.impl("checked_ids", _checked_ids, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mfwm::checked_ids", lambda tokens, *_: torch.empty_like(tokens, dtype=torch.int64), lib=_library
)
