"""Text guidance on the GPU (formula in ``guidance.py``): one query row of every head against the visual keys.

One launch without a workspace: each program computes the softmax denominators itself (a few million multiplications) and then
writes its own tile of columns, heads summed in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec
from .importance_kernels import LOG2_E, MIN_DOT_WIDTH, add_keys, dot_rows, load_rows, product_constants

__all__ = ["KERNELS", "LAST_TOKEN_ATTENTION"]


@triton.jit
def last_token_attention_kernel(
    query, key, is_visual, length, attention,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """g_j = mean_h softmax_j(scale · q_h·k_j) over the visual j, for TILE columns; scale > 0."""
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    own_visual = tl.load(is_visual + own, mask=own < length, other=0) != 0
    head = tl.arange(0, HEAD_TILE)
    total = tl.zeros((TILE,), tl.float32)
    for key_head in range(0, KV):
        query_head = query + key_head * (H // KV) * D
        keys = key + key_head * length * D
        query_high = load_rows(query_head, head, H // KV, D, 0, HIGH, TYPE)
        query_low = query_high
        if LOW > 0:
            query_low = load_rows(query_head, head, H // KV, D, HIGH, LOW, TYPE)
        peak = tl.full((HEAD_TILE,), float("-inf"), tl.float32)
        denominator = tl.zeros((HEAD_TILE,), tl.float32)
        for start in range(0, length, TILE):
            column = start + tl.arange(0, TILE)
            visual = tl.load(is_visual + column, mask=column < length, other=0) != 0
            scores = dot_rows(query_high, query_low, keys, column, length, D, HIGH, LOW, TYPE)
            peak, denominator = add_keys(peak, denominator, tl.where(visual[None, :], scores, float("-inf")), SCALE * LOG2_E)
        scores = dot_rows(query_high, query_low, keys, own, length, D, HIGH, LOW, TYPE)
        counts = own_visual[None, :] & (head[:, None] < H // KV)
        share = tl.exp2((scores - peak[:, None]) * (SCALE * LOG2_E)) / denominator[:, None]
        total += tl.sum(tl.where(counts, share, 0.0), 0)
    tl.store(attention + own, total / H, mask=own < length)


def _constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    head_tile = max(triton.next_power_of_2(values["H"] // values["KV"]), MIN_DOT_WIDTH)
    heads = {"H": values["H"], "KV": values["KV"], "HEAD_TILE": head_tile}
    return {**heads, **product_constants(values["D"], precision), "SCALE": values["scale"], "TILE": 16 if precision == "fp32" else 64}


LAST_TOKEN_ATTENTION = KernelSpec(
    op="LastTokenAttention",
    kernel=last_token_attention_kernel,
    inputs=(
        ArgumentSpec("query", "T", ("H", "D")),
        ArgumentSpec("key", "T", ("KV", "S", "D")),
        ArgumentSpec("is_visual", "bool", ("S",)),
    ),
    sizes={"length": "S"},
    outputs=(ArgumentSpec("attention", "float32", ("S",)),),
    grid=("(S + TILE - 1) // TILE", "1", "1"),
    constants=_constants,
    static=("H", "KV", "D"),
    attributes=("scale",),
    num_stages=3,
)
KERNELS = (LAST_TOKEN_ATTENTION,)
