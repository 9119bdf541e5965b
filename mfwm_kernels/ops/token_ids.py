"""Raises for token ids that are out of range, on every device and without waiting for a GPU.

On the CPU the call raises. On a GPU the result of the check is copied to pinned memory asynchronously, and the next
call of the op, or `check_errors()`, raises. An id that is out of range is never used as an index.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Shared


@dataclass
class _Report:
    """The bad ids of all calls on one GPU so far. Only the device writes to it, so no report is lost or repeated.

    found     [2, 4] on the device. First row: how many bad ids in all, then one of them, its index in the flattened
              tokens and the vocabulary. Calls without a bad id write their details to the second row
    pinned    the first row, copied to the host after every call
    raised    how many bad ids errors have reported so far
    """

    found: Shared
    pinned: Tensor
    raised: int = 0


_reports: dict[torch.device, _Report] = {}


def checked_ids(tokens: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """`tokens` as int64, with `ignore_index` in place of ids that are not in [0, vocabulary)."""
    return torch.ops.mfwm.checked_ids(tokens, vocabulary, ignore_index)


def check_errors() -> None:
    """Wait for all GPUs and raise ValueError if an earlier call had a token id that is out of range."""
    for device in list(_reports):
        torch.cuda.synchronize(device)
    raise_pending()


def raise_pending() -> None:
    """Raise for bad ids that have reached the host so far, without waiting."""
    for device, report in _reports.items():
        count, value, index, vocabulary = report.pinned.tolist()
        if count > report.raised:
            new, report.raised = count - report.raised, count
            raise ValueError(
                f"tokens must be in [0, {vocabulary}) or ignore_index: an earlier call on {device} had {new} "
                f"other ids, such as {value} at flat index {index}"
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
            index = bad.nonzero()[0].tolist()
            raise ValueError(
                f"tokens must be in [0, {vocabulary}) or ignore_index = {ignore_index}; "
                f"tokens{index} = {ids[tuple(index)]}"
            )
        return ids.clone() if ids is tokens else ids
    if tokens.device.type == "cuda" and tokens.numel():
        report = _report_of(tokens.device)
        found = report.found.ready()
        write(found, ids, bad, vocabulary)
        report.pinned.copy_(found[0], non_blocking=True)
    return ids.masked_fill(bad, ignore_index)


@contextlib.contextmanager
def recording(tokens: Tensor, vocabulary: int, ignore_index: int) -> Iterator[Tensor]:
    """For a kernel that checks the ids itself: [4] int64 for their number, to which it adds, and the details of one of
    them. The host copy follows. On the CPU bad ids raise first, as in `checked_ids`."""
    if tokens.device.type != "cuda" or not tokens.numel():
        if tokens.device.type == "cpu":
            checked_ids(tokens, vocabulary, ignore_index)
        yield torch.empty(4, dtype=torch.int64, device=tokens.device)
        return
    report = _report_of(tokens.device)
    found = report.found.ready()
    yield found[0]
    report.pinned.copy_(found[0], non_blocking=True)


def write(found: Tensor, ids: Tensor, bad: Tensor, vocabulary: int) -> None:
    """Add a call's bad ids to `found`. Calls on several streams may overlap, so the count is added atomically, and
    calls without bad ids leave the details in the first row unchanged."""
    count = bad.sum().view(1)
    index = bad.flatten().int().argmax().view(1)
    details = torch.stack([ids.flatten()[index], index, torch.full_like(index, vocabulary)], 1)
    found[:, 1:].index_copy_(0, (count == 0).long(), details)
    found[:, 0].index_add_(0, torch.zeros_like(index), count)


_library = torch.library.Library("mfwm", "FRAGMENT")
_library.define("checked_ids(Tensor tokens, int vocabulary, int ignore_index) -> Tensor")
_library.impl("checked_ids", _checked_ids, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mfwm::checked_ids", lambda tokens, *_: torch.empty_like(tokens, dtype=torch.int64), lib=_library
)
