"""Malformed calls of heads and distributions: each error names the argument, the rule and the value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mfwm import HeadsConfig, MultiFrameHeads
from mfwm.models.distributions import Distribution

from mfwm_kernels import Horizons

TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
TWO = Horizons((1, 2), (1, 2))


def pixel_call(**changes: Any) -> Any:
    """The loss of heads of pixels, whose arguments `changes` replaces; its method predict if a temperature is given."""
    call = {"hidden": torch.randn(2, 5, 2, 2, 32), "actions": torch.randn(2, 5, 32), "video": torch.rand(2, 6, 3, 8, 8)}
    heads = MultiFrameHeads(32, 4, HeadsConfig(TWO, kind="gaussian"))
    return (heads.predict if "temperature" in changes else heads)(**{**call, **changes})


def token_call(**changes: Any) -> Any:
    """The loss of heads of tokens, with tokenised targets."""
    heads = MultiFrameHeads(32, 1, HeadsConfig(TWO, **TOKENS, token_targets="tokenised"), ids_per_token=2)
    low = {2: torch.zeros(2, 6, 2, 2, 2).long()}
    call = {"video": torch.zeros(2, 6, 4, 4, 2).long(), "low_tokens": low, "position_weights": torch.ones(2, 5, 2)}
    return heads(torch.randn(2, 5, 4, 4, 32), torch.randn(2, 5, 32), **{**call, **changes})


def surgery_call(**changes: Any) -> Any:
    """The loss of heads that measure gradients before they call the ops."""
    call = {"hidden": torch.randn(2, 5, 2, 2, 32), "actions": torch.randn(2, 5, 32), "video": torch.rand(2, 6, 3, 8, 8)}
    return MultiFrameHeads(32, 4, HeadsConfig(TWO, surgery=True))(**{**call, **changes})


def new_heads(**changes: Any) -> Any:
    return MultiFrameHeads(**{"width": 32, "patch_size": 4, "config": HeadsConfig(TWO), **changes})


def distribution(method: str, *args: Any, kind: Any = "laplace", **options: Any) -> Any:
    return getattr(Distribution(kind, torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4)), method)(*args, **options)


MALFORMED: list[tuple[Any, dict[str, Any], str]] = [
    (new_heads, {"width": 0}, "width must be >= 1, got 0"),
    (new_heads, {"width": "32"}, "width must be an integer, got '32'"),
    (new_heads, {"patch_size": False}, "patch_size must be an integer, got False"),
    (new_heads, {"channels": -1}, "channels must be >= 1, got -1"),
    (new_heads, {"ids_per_token": None}, "ids_per_token must be an integer, got None"),
    (new_heads, {"head_width": 0}, "head_width must be >= 1, got 0"),
    (new_heads, {"window": 0}, "window must be >= 1, got 0"),
    (new_heads, {"rotary": 1}, "rotary must be True or False, got 1"),
    (new_heads, {"config": {}}, "config must be a HeadsConfig, got dict"),
    (new_heads, {"grid": (4, 4, 4)}, r"grid must be a pair of integers \(Hp, Wp\), got \(4, 4, 4\)"),
    (pixel_call, {"hidden": torch.zeros(2, 5, 2, 2, 31)}, r"hidden must have width D = 32, got shape .*31\]"),
    (pixel_call, {"near_hidden": torch.zeros(2, 4, 2, 2, 32)}, r"near_hidden must have shape of hidden = \[2, 5, 2"),
    (pixel_call, {"near_hidden": torch.zeros(2, 5, 2, 2, 32, device="meta")}, "near_hidden must be on the device of"),
    (pixel_call, {"actions": [1]}, "actions must be a torch.Tensor, got list"),
    (pixel_call, {"actions": torch.zeros(5, 32)}, r"actions must have 3 dimensions, \[B, T_a, D\]"),
    (pixel_call, {"video": None}, "video must be a torch.Tensor, got NoneType"),
    (
        pixel_call,
        {"video": torch.zeros(2, 6, 3, 8, 8, dtype=torch.int64)},
        "video must have dtype uint8, .*, got int64",
    ),
    (pixel_call, {"video": torch.zeros(2, 4, 3, 8, 8)}, "video must have V >= T = 5 frames, .* got 4"),
    (pixel_call, {"segment_ids": torch.zeros(1, 6).int()}, r"segment_ids must have .*\[B, 6\], got \[1, 6\]"),
    (pixel_call, {"token_mask": torch.ones(2, 6, 2, 2).bool()}, 'token_mask must be None for output "pixels"'),
    (pixel_call, {"low_tokens": 3}, "low_tokens must map factors to ids, got int"),
    (pixel_call, {"low_tokens": {0: None}}, "low_tokens' factor must be >= 1, got 0"),
    (pixel_call, {"return_predictions": 0}, "return_predictions must be True or False, got 0"),
    (pixel_call, {"shares": [1.0]}, "shares must be a torch.Tensor, got list"),
    (pixel_call, {"shares": torch.ones(2, 2)}, r"shares must have shape \[K \+ 3, K\] = \[5, 2\], got \[2, 2\]"),
    # A size of 1 would broadcast.
    (pixel_call, {"temperature": 0, "video": torch.zeros(1, 6, 3, 8, 8)}, r"video must have shape .*got \[1, 6, 3"),
    (pixel_call, {"temperature": 0, "video": torch.zeros(2, 6, 1, 8, 8)}, r"video must have shape .*got \[2, 6, 1"),
    (pixel_call, {"temperature": 0, "video": torch.zeros(2, 6, 3, 8, 9)}, r"video must have shape .*8, 9\]"),
    (pixel_call, {"temperature": True}, "temperature must be a number, got bool"),
    (pixel_call, {"temperature": math.nan}, "temperature must be finite, got nan"),
    (pixel_call, {"temperature": -0.5}, "temperature must be >= 0, got -0.5"),
    (pixel_call, {"temperature": 0, "generator": 3}, "generator must be a torch.Generator, got int"),
    (pixel_call, {"temperature": 0, "near_only": 1}, "near_only must be True or False, got 1"),
    (surgery_call, {"hidden": None}, "hidden must be a torch.Tensor, got NoneType"),
    (surgery_call, {"near_hidden": 3}, "near_hidden must be a torch.Tensor, got int"),
    (surgery_call, {"grad_monitor": object()}, "grad_monitor must be a GradMonitor, got object"),
    (token_call, {"video": torch.zeros(2, 6, 4, 4, 1).long()}, r"video must have shape .* = \[2, 6, 4, 4, 2\]"),
    (token_call, {"video": torch.zeros(2, 6, 4, 4, 2)}, "video must have dtype int32, int64, got float32"),
    (token_call, {"position_weights": [1.0]}, "position_weights must be a torch.Tensor, got list"),
    (token_call, {"position_weights": torch.ones(2, 5, 3)}, r"position_weights must .* = \[2, 5, 2\], got \[2, 5, 3\]"),
    (token_call, {"position_weights": torch.ones(2, 5, 1)}, r"position_weights must .* = \[2, 5, 2\], got \[2, 5, 1\]"),
    (token_call, {"low_tokens": None}, r"low_tokens must have the ids of factor 2, got factors \[\]"),
    (token_call, {"low_tokens": {2: None}}, r"low_tokens\[2\] must be a torch.Tensor, got NoneType"),
    (
        token_call,
        {"low_tokens": {2: torch.zeros(2, 6, 2, 1, 2).long()}},
        r"low_tokens\[2\] must have shape .*2, 2, 2\]",
    ),
    (distribution, {"method": "draw", "temperature": -1.0}, "temperature must be >= 0, got -1.0"),
    (
        distribution,
        {"method": "draw", "temperature": 1.0, "generator": 0},
        "generator must be a torch.Generator, got int",
    ),
    (distribution, {"method": "draw", "temperature": 1.0, "kind": "normal"}, "kind must be .*, got 'normal'"),
    (
        distribution,
        {"method": "negative_log_likelihood", "truth": torch.zeros(1, 2, 1, 4, 4)},
        r"truth must have shape of the mean = \[1, 2, 3, 4, 4\], got \[1, 2, 1, 4, 4\]",
    ),
    (distribution, {"method": "negative_log_likelihood", "truth": 0.5}, "truth must be a torch.Tensor, got float"),
    (distribution, {"method": "covers", "truth": torch.zeros(1, 2, 3, 4, 4), "share": 1}, "share must be < 1, got 1"),
    (distribution, {"method": "covers", "truth": torch.zeros(1).byte(), "share": 0.5}, "truth must have 5 dimensions"),
]


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(MALFORMED)],
)
def test_malformed_calls_are_refused_by_name(function: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        function(**changes)


def test_well_formed_calls_pass() -> None:
    pixel_call()
    pixel_call(temperature=1.0, generator=torch.Generator())
    surgery_call()
    token_call()
    new_heads()
    assert distribution("covers", torch.zeros(1, 2, 3, 4, 4), share=0).all()
