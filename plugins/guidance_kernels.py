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
from .importance_kernels import LOG2_E, MIN_DOT_WIDTH, load_rows, product_constants

__all__ = ["KERNELS", "LAST_TOKEN_ATTENTION"]


@triton.jit
def _scores(query_high, query_low, key, column, length, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr):
    """q·k of one run of heads that share a key head: [heads, columns]."""
    scores = tl.dot(query_high, tl.trans(load_rows(key, column, length, D, 0, HIGH, TYPE)), input_precision="ieee")
    if LOW > 0:
        scores = tl.dot(query_low, tl.trans(load_rows(key, column, length, D, HIGH, LOW, TYPE)), scores, input_precision="ieee")
    return scores


@triton.jit
def last_token_attention_kernel(
    query, key, is_visual, length, attention,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """g_j = mean_h softmax_j(scale · q_h·k_j) over the visual j, for TILE columns."""
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
            scores = _scores(query_high, query_low, keys, column, length, D, HIGH, LOW, TYPE) * (SCALE * LOG2_E)
            scores = tl.where(visual[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no visual token yet
            denominator = denominator * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            peak = new_peak
        scores = _scores(query_high, query_low, keys, own, length, D, HIGH, LOW, TYPE) * (SCALE * LOG2_E)
        counts = own_visual[None, :] & (head[:, None] < H // KV)
        share = tl.exp2(scores - peak[:, None]) / denominator[:, None]
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
)
KERNELS = (LAST_TOKEN_ATTENTION,)
