"""The block of PyTorch under "Equivalent" in the docstring of each op computes what the op computes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mfwm_kernels
from mfwm_kernels import Horizons

HORIZONS = Horizons((1, 2, 4), (1, 2, 2))
B, T, D, K = 2, 5, 8, 3


def average_of_tokens(x: Tensor, f: int) -> Tensor:
    return F.avg_pool2d(x.flatten(0, 1).movedim(-1, 1), f).movedim(1, -1).unflatten(0, x.shape[:2])


def average_of_pixels(x: Tensor, f: int) -> Tensor:
    return F.avg_pool2d(x.flatten(0, 1), f).unflatten(0, x.shape[:2])


def formula(op: Callable[..., Any]) -> str:
    text = inspect.getdoc(op) or ""
    block = re.search(r"^Equivalent.*?:\n\n((?: {4}.*\n)+)", text, re.MULTILINE)
    assert block, f"the docstring of {op.__name__} has no block under a line that begins with Equivalent"
    return inspect.cleandoc(block[1])


def value_of(code: str, names: dict[str, Any]) -> Any:
    """The last expression of `code`, or what it assigns to `total`."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        return value_of(f"{code}\ntotal", names)
    public = {name: getattr(mfwm_kernels, name) for name in mfwm_kernels.__all__}
    scope = {"torch": torch, "F": F, **public, **names}
    exec(compile(ast.Module(tree.body[:-1], []), "formula", "exec"), scope)
    return eval(compile(ast.Expression(last.value), "formula", "eval"), scope)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def conditioned() -> dict[str, Any]:
    arguments = {"hidden": normal(B, T, 4, 4, D), "actions": normal(B, T + 3, D), "condition": normal(B, T, K, D)}
    return {**arguments, "horizons": HORIZONS, "norm_weight": normal(D), "norm_eps": 1e-6}


def window() -> tuple[dict[str, Any], dict[str, Any]]:
    gates = normal(K, 4, D)
    return {"actions": normal(B, T, D), "offsets": (1, 2, 4), "lag_weight": gates, "window_start": 0}, {}


def states() -> tuple[dict[str, Any], dict[str, Any]]:
    return {**conditioned(), "pool": (1, 2, 4)}, {"D": D, "avg_pool": average_of_tokens}


def heads() -> tuple[dict[str, Any], dict[str, Any]]:
    columns = (6, 3, 2)
    of_heads = {"weights": [normal(n, D) for n in columns], "biases": [normal(n) for n in columns]}
    return {**conditioned(), "condition": None, **of_heads}, {}


def pyramid() -> tuple[dict[str, Any], dict[str, Any]]:
    options = {"scale": 0.5, "shift": 0.25, "dtype": torch.float32}
    return {"video": normal(B, T, 3, 8, 8), "factors": (1, 2, 4), **options}, {}


def losses() -> tuple[dict[str, Any], dict[str, Any]]:
    weights = torch.zeros(K, K, dtype=torch.float64)
    weights[0, 1], weights[0, 2], weights[1, 2] = 0.5, 0.25, 2.0
    arguments = {
        "preds": [normal(B, T, 3, 8 // f, 8 // f) for f in HORIZONS.factors],
        "video": normal(B, T + 4, 3, 8, 8),
        "horizons": HORIZONS,
        "horizon_weights": normal(K),
        "consistency_weights": weights,
        "scale": 0.5,
        "shift": 0.25,
    }
    names = {"T": T, "offsets": (1, 2, 4), "factors": (1, 2, 2), "pairs": ((0, 1), (0, 2), (1, 2))}
    return arguments, {**names, "avg_pool": average_of_pixels}


def token_losses() -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = {
        "inputs": [normal(B, T, 4 // f, 4 // f, D) for f in HORIZONS.factors],
        "weight": normal(7, D),
        "tokens": torch.randint(0, 7, (B, T + 4, 4, 4)),
        "horizons": HORIZONS,
        "horizon_weights": normal(K),
        "biases": normal(7),
    }
    return arguments, {"T": T, "V": 7, "offsets": (1, 2, 4), "factors": (1, 2, 2), "avg_pool": average_of_tokens}


def join() -> tuple[dict[str, Any], dict[str, Any]]:
    norms = {"hidden_norm_weight": normal(D), "embedding_norm_weight": normal(D), "norm_eps": 1e-6}
    return {"hidden": normal(B, T, D), "embedding": normal(B, T, D), "weight": normal(4, 2 * D), **norms}, {"D": D}


CALLS = {
    "action_window_sum": window,
    "fan_out": states,
    "multi_horizon_linear": heads,
    "video_pyramid": pyramid,
    "multi_horizon_loss": losses,
    "multi_horizon_linear_cross_entropy": token_losses,
    "mtp_combine": join,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_formula_of_the_docstring_is_what_the_op_computes(name: str) -> None:
    arguments, names = CALLS[name]()
    op = getattr(mfwm_kernels, name)
    got = op(**arguments)
    expected = value_of(formula(op), {"B": B, "T": T, "K": K, **arguments, **names})
    got = got.total if isinstance(got, mfwm_kernels.HorizonLoss) else got
    tolerance = 1e-6 if name == "video_pyramid" else 1e-9
    torch.testing.assert_close(
        list(got) if isinstance(got, tuple) else got, expected, rtol=tolerance, atol=tolerance, check_dtype=False
    )
