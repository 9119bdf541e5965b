"""A kernel whose pipelined loop overwrites the tile that a dot reads, and one whose does not: their rows in aot."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from mfwm_kernels.aot import compiled_row
from mfwm_kernels.aot_compile import Variant, compile_for
from mfwm_kernels.launches import Pointer
from mfwm_kernels.pipelines import races


@triton.jit
def product_and_norm(a, b, out, norms, depth, TWICE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, SIDE), tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    squares = tl.zeros([SIDE], tl.float32)
    for start in range(0, depth, BLOCK):
        d = start + tl.arange(0, BLOCK)
        place = row[:, None] * depth + d[None, :]
        tile = tl.load(a + place)
        total = tl.dot(tile, tl.load(b + d[:, None] * SIDE + column[None, :]), total)
        if TWICE:
            # The policy keeps this load apart from the dot's.
            tile = tl.load(a + place, eviction_policy="evict_last")
        squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
    tl.store(out + row[:, None] * SIDE + column[None, :], total)
    tl.store(norms + row, squares)


def variant_of(twice: bool, stages: int) -> Variant:
    given = (
        Pointer(torch.bfloat16, 1 << 40),
        Pointer(torch.bfloat16, 2 << 40),
        Pointer(torch.float32, 3 << 40),
        Pointer(torch.float32, 4 << 40),
        4096,
    )
    constants = {"TWICE": twice, "SIDE": 64, "BLOCK": 64, "num_warps": 4, "num_stages": stages}
    return Variant("none", "planted", ("__main__", "product_and_norm"), given, constants)


def main() -> None:
    for architecture, stages in (("sm_90", 2), ("sm_90", 3), ("sm_90", 4), ("sm_80", 3), ("sm_100", 3)):
        for twice in (False, True):
            row = compiled_row(architecture, variant_of(twice, stages))
            print(json.dumps({"twice": twice, "stages": stages, **row}))
    # On sm_100 a barrier holds the copy back. Without it the copy overwrites what the dot reads.
    text = compile_for("sm_100", variant_of(False, 3)).asm["ttgir"]
    unguarded = "\n".join(line for line in text.splitlines() if "ttng.wait_barrier" not in line)
    print(json.dumps({"unguarded": races(unguarded)}))


if __name__ == "__main__":
    main()
