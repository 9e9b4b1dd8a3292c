"""Text guidance on the GPU (formulas in ``guidance.py``): one query row of every head against the visual keys, which are read once by each kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec
from .guidance import KEY_BLOCK
from .importance_kernels import LN_2, LOG2_E, MIN_DOT_WIDTH, add_keys, dot_rows, load_parts, product_constants

__all__ = ["KERNELS", "LAST_TOKEN_ATTENTION", "LAST_TOKEN_LOG_SUM_EXP"]

LOWEST_LSE = tl.constexpr(-1e30)  # of a block without visual tokens


@triton.jit
def last_token_log_sum_exp_kernel(
    query, key, is_visual, length, blocks, block_lse,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """λ of one block of keys, for the heads that share a key head; scale > 0."""
    block, key_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEAD_TILE)
    query_high, query_low = load_parts(query + key_head * (H // KV) * D, head, H // KV, D, HIGH, LOW, TYPE)
    peak = tl.full((HEAD_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((HEAD_TILE,), tl.float32)
    for start in range(0, BLOCK, TILE):
        column = block * BLOCK + start + tl.arange(0, TILE)
        visual = tl.load(is_visual + column, mask=column < length, other=0) != 0
        scores = dot_rows(query_high, query_low, key + key_head * length * D, column, length, D, HIGH, LOW, TYPE)
        peak, total = add_keys(peak, total, tl.where(visual[None, :], scores, float("-inf")), SCALE * LOG2_E)
    lse = tl.maximum((peak * (SCALE * LOG2_E) + tl.log2(total)) * LN_2, LOWEST_LSE)
    tl.store(block_lse + (key_head * (H // KV) + head) * blocks + block, lse, mask=head < H // KV)


@triton.jit
def last_token_attention_kernel(
    query, key, is_visual, block_lse, length, blocks, attention,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr, TILE: tl.constexpr, LSE_TILE: tl.constexpr,
):  # fmt: skip
    """g of TILE columns, heads summed in order."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    visual = tl.load(is_visual + column, mask=column < length, other=0) != 0
    head = tl.arange(0, HEAD_TILE)
    total = tl.zeros((TILE,), tl.float32)
    for key_head in range(0, KV):
        peak = tl.full((HEAD_TILE,), float("-inf"), tl.float32)
        denominator = tl.zeros((HEAD_TILE,), tl.float32)
        for start in range(0, blocks, LSE_TILE):
            block = start + tl.arange(0, LSE_TILE)
            inside = (head[:, None] < H // KV) & (block[None, :] < blocks)
            lse = tl.load(block_lse + (key_head * (H // KV) + head[:, None]) * blocks + block[None, :], mask=inside, other=float("-inf"))
            peak, denominator = add_keys(peak, denominator, lse, LOG2_E)
        base = peak * LOG2_E + tl.log2(denominator)
        query_high, query_low = load_parts(query + key_head * (H // KV) * D, head, H // KV, D, HIGH, LOW, TYPE)
        keys = key + tl.full((), key_head, tl.int64) * length * D
        scores = dot_rows(query_high, query_low, keys, column, length, D, HIGH, LOW, TYPE)
        counts = visual[None, :] & (head[:, None] < H // KV)
        total += tl.sum(tl.where(counts, tl.exp2(scores * (SCALE * LOG2_E) - base[:, None]), 0.0), 0)
    tl.store(attention + column, total / H, mask=column < length)


def _constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    head_tile = max(triton.next_power_of_2(values["H"] // values["KV"]), MIN_DOT_WIDTH)
    heads = {"H": values["H"], "KV": values["KV"], "HEAD_TILE": head_tile}
    return {**heads, **product_constants(values["D"], precision), "SCALE": values["scale"], "TILE": 16 if precision == "fp32" else 64}


def _block_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {**_constants(values, precision), "BLOCK": KEY_BLOCK}


def _attention_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {**_constants(values, precision), "LSE_TILE": 64}


BLOCKS = f"(S + {KEY_BLOCK - 1}) // {KEY_BLOCK}"
INPUTS = (ArgumentSpec("query", "T", ("H", "D")), ArgumentSpec("key", "T", ("KV", "S", "D")), ArgumentSpec("is_visual", "bool", ("S",)))

LAST_TOKEN_LOG_SUM_EXP = KernelSpec(
    op="LastTokenLogSumExp",
    kernel=last_token_log_sum_exp_kernel,
    inputs=INPUTS,
    sizes={"length": "S", "blocks": BLOCKS},
    outputs=(ArgumentSpec("block_lse", "float32", ("H", BLOCKS)),),
    grid=(BLOCKS, "KV", "1"),
    constants=_block_constants,
    static=("H", "KV", "D"),
    attributes=("scale",),
)
LAST_TOKEN_ATTENTION = KernelSpec(
    op="LastTokenAttention",
    kernel=last_token_attention_kernel,
    inputs=(*INPUTS, ArgumentSpec("block_lse", "float32", ("H", "B"))),
    sizes={"length": "S", "blocks": "B"},
    outputs=(ArgumentSpec("attention", "float32", ("S",)),),
    grid=("(S + TILE - 1) // TILE", "1", "1"),
    constants=_attention_constants,
    static=("H", "KV", "D"),
    attributes=("scale",),
)
KERNELS = (LAST_TOKEN_LOG_SUM_EXP, LAST_TOKEN_ATTENTION)
