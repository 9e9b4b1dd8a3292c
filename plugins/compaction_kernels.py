"""What becomes of the tokens, on the GPU (definitions in ``compaction.py``): one pass over the features.

``merge_tokens``: one program a survivor and tile of columns. It looks through ``slot`` for its members in chunks and reads the rows of these
alone, so every feature is read once and written once; sums run in index order, so results repeat bit for bit.
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
    features, importance, index, slot, tokens, merged, summed, members,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, SCAN_TILE: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """Σ w x / Σ w over a survivor and its members, w = max(s, 0) + ε; without members the row is copied bit for bit."""
    survivor = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    own = tl.load(index + survivor)
    own_row = tl.load(features + own * F + column, mask=column < F, other=0.0)
    own_importance = tl.load(importance + own)
    total_weight = tl.maximum(own_importance, 0.0) + FLOOR
    total = own_row.to(tl.float32) * total_weight
    total_importance = own_importance
    count = 1
    for start in range(0, tokens, SCAN_TILE):
        token = start + tl.arange(0, SCAN_TILE)
        mine = (tl.load(slot + token, mask=token < tokens, other=-1) == survivor) & (token != own)
        found = tl.sum(mine.to(tl.int32), 0)
        if found > 0:
            count += found
            for first in range(start, tl.minimum(start + SCAN_TILE, tokens), ROW_TILE):
                row = first + tl.arange(0, ROW_TILE)
                member = (tl.load(slot + row, mask=row < tokens, other=-1) == survivor) & (row != own)
                if tl.sum(member.to(tl.int32), 0) > 0:
                    score = tl.load(importance + row, mask=member, other=0.0)
                    weight = tl.where(member, tl.maximum(score, 0.0) + FLOOR, 0.0)
                    inside = member[:, None] & (column[None, :] < F)
                    rows = tl.load(features + row.to(tl.int64)[:, None] * F + column[None, :], mask=inside, other=0.0)
                    total += tl.sum(rows.to(tl.float32) * weight[:, None], 0)
                    total_weight += tl.sum(weight, 0)
                    total_importance += tl.sum(score, 0)
    mixed = (total / total_weight).to(own_row.dtype)
    tl.store(merged + survivor.to(tl.int64) * F + column, tl.where(count > 1, mixed, own_row), mask=column < F)
    if tl.program_id(1) == 0:
        tl.store(summed + survivor, total_importance)
        tl.store(members + survivor, count)


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
    tile = min(triton.next_power_of_2(values["F"]), 1024)
    return {"F": values["F"], "FLOOR": values["floor"], "TILE": tile, "SCAN_TILE": 1024, "ROW_TILE": 16}


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
    ),
    sizes={"tokens": "N"},
    outputs=(ArgumentSpec("merged", "T", ("M", "F")), ArgumentSpec("summed", "float32", ("M",)), ArgumentSpec("members", "int64", ("M",))),
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
