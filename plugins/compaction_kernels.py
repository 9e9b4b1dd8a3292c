"""What becomes of the tokens, on the GPU (definitions in ``compaction.py``): one pass over the features.

``merge_tokens``: one program a survivor and tile of columns. Most survivors are alone and are copied; the others look through ``slot`` for their
members in chunks, gather these by their number within the chunk, and read their rows alone, so every feature is read once and written once; sums
run in index order, so results repeat bit for bit.
``gather_tokens``: one program a survivor and row of the batch copies all that travels along the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec

__all__ = ["GATHER_TOKENS", "KERNELS", "MERGE_TOKENS"]

MAX_TILE = 4096  # columns that a program moves at once: 16-byte loads of 4 a thread


@triton.jit
def merge_tokens_kernel(
    features, importance, index, slot, members, tokens, merged, summed,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, SCAN_TILE: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """Σ w x / Σ w over a survivor and its members, w = max(s, 0) + ε; a survivor alone is copied bit for bit."""
    survivor = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    target = merged + survivor.to(tl.int64) * F + column
    own = tl.load(index + survivor)
    if tl.load(members + survivor) == 1:
        tl.store(target, tl.load(features + own * F + column, mask=column < F), mask=column < F)
        if tl.program_id(1) == 0:
            tl.store(summed + survivor, tl.load(importance + own))
    else:
        total = tl.zeros((TILE,), tl.float32)
        total_weight = 0.0
        total_importance = 0.0
        for start in range(0, tokens, SCAN_TILE):
            token = start + tl.arange(0, SCAN_TILE)
            mine = (tl.load(slot + token, mask=token < tokens, other=-1) == survivor).to(tl.int32)
            found = tl.sum(mine, 0)
            if found > 0:
                seen = tl.cumsum(mine, 0)
                for first in range(0, found, ROW_TILE):
                    number = first + tl.arange(0, ROW_TILE)
                    row = start + tl.sum((seen[None, :] <= number[:, None]).to(tl.int32), 1)  # the number-th member of this chunk
                    score = tl.load(importance + row, mask=number < found, other=0.0)
                    weight = tl.where(number < found, tl.maximum(score, 0.0) + FLOOR, 0.0)
                    inside = (number < found)[:, None] & (column[None, :] < F)
                    rows = tl.load(features + row.to(tl.int64)[:, None] * F + column[None, :], mask=inside, other=0.0)
                    total += tl.sum(rows.to(tl.float32) * weight[:, None], 0)
                    total_weight += tl.sum(weight, 0)
                    total_importance += tl.sum(score, 0)
        tl.store(target, (total / total_weight).to(merged.dtype.element_ty), mask=column < F)
        if tl.program_id(1) == 0:
            tl.store(summed + survivor, total_importance)


@triton.jit
def _copy_row(source, target, source_row, target_row, WIDTH: tl.constexpr, TILE: tl.constexpr):
    for first in tl.static_range(0, WIDTH, TILE):
        column = first + tl.arange(0, TILE)
        row = tl.load(source + source_row * WIDTH + column, mask=column < WIDTH)
        tl.store(target + target_row * WIDTH + column, row, mask=column < WIDTH)


@triton.jit
def gather_tokens_kernel(
    hidden, cos, sin, key, index, length, count, hidden_kept, cos_kept, sin_kept, key_kept,
    C: tl.constexpr, E: tl.constexpr, HIDDEN_TILE: tl.constexpr, ROTARY_TILE: tl.constexpr,
):  # fmt: skip
    """Row ``index[m]`` of hidden states, rotary tables and ranking keys."""
    survivor, batch = tl.program_id(0), tl.program_id(1)
    token = tl.load(index + survivor)
    source = batch.to(tl.int64) * length + token
    target = batch.to(tl.int64) * count + survivor
    _copy_row(hidden, hidden_kept, source, target, C, HIDDEN_TILE)
    _copy_row(cos, cos_kept, source, target, E, ROTARY_TILE)
    _copy_row(sin, sin_kept, source, target, E, ROTARY_TILE)
    if batch == 0:
        tl.store(key_kept + survivor, tl.load(key + token))


def _merge_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    tile = min(triton.next_power_of_2(values["F"]), 512)
    return {"F": values["F"], "FLOOR": values["floor"], "TILE": tile, "SCAN_TILE": 256, "ROW_TILE": 32}


def _gather_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    tiles = {f"{name}_TILE": min(triton.next_power_of_2(values[size]), MAX_TILE) for name, size in (("HIDDEN", "C"), ("ROTARY", "E"))}
    return {"C": values["C"], "E": values["E"], **tiles}


MERGE_TOKENS = KernelSpec(
    op="MergeTokens",
    kernel=merge_tokens_kernel,
    inputs=(
        ArgumentSpec("features", "T", ("N", "F")),
        ArgumentSpec("importance", "float32", ("N",)),
        ArgumentSpec("index", "int64", ("M",)),
        ArgumentSpec("slot", "int64", ("N",)),
        ArgumentSpec("members", "int64", ("M",)),
    ),
    sizes={"tokens": "N"},
    outputs=(ArgumentSpec("merged", "T", ("M", "F")), ArgumentSpec("summed", "float32", ("M",))),
    grid=("M", "(F + TILE - 1) // TILE", "1"),
    constants=_merge_constants,
    static=("F",),
    attributes=("floor",),
)
GATHER_TOKENS = KernelSpec(
    op="GatherTokens",
    kernel=gather_tokens_kernel,
    inputs=(
        ArgumentSpec("hidden", "T", ("B", "S", "C")),
        ArgumentSpec("cos", "T", ("B", "S", "E")),
        ArgumentSpec("sin", "T", ("B", "S", "E")),
        ArgumentSpec("key", "float32", ("S",)),
        ArgumentSpec("index", "int64", ("M",)),
    ),
    sizes={"length": "S", "count": "M"},
    outputs=(
        ArgumentSpec("hidden_kept", "T", ("B", "M", "C")),
        ArgumentSpec("cos_kept", "T", ("B", "M", "E")),
        ArgumentSpec("sin_kept", "T", ("B", "M", "E")),
        ArgumentSpec("key_kept", "float32", ("M",)),
    ),
    grid=("M", "B", "1"),
    constants=_gather_constants,
    static=("C", "E"),
)
KERNELS = (MERGE_TOKENS, GATHER_TOKENS)
