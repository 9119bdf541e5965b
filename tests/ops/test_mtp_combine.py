"""Tests of mtp_combine alone: the weights of a Megatron checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends_of

from mfwm_kernels import mtp_combine, use_backend

pytestmark = pytest.mark.usefixtures("size")


@pytest.mark.parametrize("backend", backends_of("mtp_combine"))
def test_megatron_layout(backend: str) -> None:
    """Tensors named and laid out as Megatron's MultiTokenPredictionLayer stores them: the embedding comes first."""
    width = 24
    checkpoint = {
        "eh_proj.weight": torch.randn(width, 2 * width),
        "enorm.weight": torch.randn(width),
        "hnorm.weight": torch.randn(width),
    }
    hidden, embedding = torch.randn(5, 2, width), torch.randn(5, 2, width)
    with use_backend(backend):
        got = mtp_combine(
            hidden,
            embedding,
            checkpoint["eh_proj.weight"],
            hidden_norm_weight=checkpoint["hnorm.weight"],
            embedding_norm_weight=checkpoint["enorm.weight"],
            norm_eps=1e-5,
            order="embedding_first",
        )
    # As Megatron computes it: decoder_input = enorm(embedding), hidden = hnorm(hidden), eh_proj(cat(both)).
    normed = [
        F.rms_norm(embedding, (width,), checkpoint["enorm.weight"], 1e-5),
        F.rms_norm(hidden, (width,), checkpoint["hnorm.weight"], 1e-5),
    ]
    want = torch.cat(normed, -1) @ checkpoint["eh_proj.weight"].T
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    """fp32 to bf16; fp64 stays."""
    hidden, embedding, weight, ones = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3, 16), torch.ones(8)
    hidden, embedding, weight, ones = (t.to(dtype) for t in (hidden, embedding, weight, ones))
    norms = {"hidden_norm_weight": ones, "embedding_norm_weight": ones}
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = mtp_combine(hidden, embedding, weight, **norms), F.linear(hidden, weight[:, :8]).dtype
    assert got.dtype == wanted
    given = [t.to(wanted) for t in (hidden, embedding, weight)]
    assert torch.equal(got, mtp_combine(*given, **{name: norm.to(wanted) for name, norm in norms.items()}))
