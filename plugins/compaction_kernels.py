"""What becomes of the tokens, on the GPU (definitions in ``compaction.py``): one pass over the features.

``merge_tokens``: a program has a tile of columns, and either survivors that stand for several tokens or a block of survivors of which it copies
those that are alone. The former programs come first, since a cell can be large; they read the rows that ``group_tokens`` has listed, several tiles
ahead. Every feature is read once and written once, and sums have a fixed order, so results repeat bit for bit.
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
def _copy_alone(
    features, importance, index, members, survivors, merged, summed, column, first,
    F: tl.constexpr, ALONE_TILE: tl.constexpr,
):  # fmt: skip
    """Those of the survivors from ``first`` on that are alone, bit for bit."""
    survivor = first + tl.arange(0, ALONE_TILE)
    alone = tl.load(members + survivor, mask=survivor < survivors, other=0) == 1
    own = tl.load(index + survivor, mask=alone, other=0)
    inside = alone[:, None] & (column < F)[None, :]
    rows = tl.load(features + own[:, None] * F + column[None, :], mask=inside)
    tl.store(merged + survivor.to(tl.int64)[:, None] * F + column[None, :], rows, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(summed + survivor, tl.load(importance + own, mask=alone), mask=alone)


@triton.jit
def _merge_group(
    features, importance, order, start, size, survivor, merged, summed, column,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, ROW_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The ``size`` tokens from ``order[start]`` on, as one. Each lane of a tile has its own sums; loads run ``STAGES`` tiles ahead."""
    total = tl.zeros((ROW_TILE, TILE), tl.float32)
    total_weight = tl.zeros((ROW_TILE,), tl.float32)
    total_importance = tl.zeros((ROW_TILE,), tl.float32)
    for first in tl.range(0, size, ROW_TILE, num_stages=STAGES):
        place = first + tl.arange(0, ROW_TILE)
        there = place < size
        token = tl.load(order + start + place, mask=there, other=0)
        score = tl.load(importance + token, mask=there, other=0.0)
        inside = there[:, None] & (column < F)[None, :]
        rows = tl.load(features + token[:, None] * F + column[None, :], mask=inside, other=0.0)
        weight = tl.where(there, tl.maximum(score, 0.0) + FLOOR, 0.0)
        total += rows.to(tl.float32) * weight[:, None]
        total_weight += weight
        total_importance += score
    mean = tl.sum(total, 0) / tl.sum(total_weight, 0)
    tl.store(merged + survivor.to(tl.int64) * F + column, mean.to(merged.dtype.element_ty), mask=column < F)
    if tl.program_id(0) == 0:
        tl.store(summed + survivor, tl.sum(total_importance, 0))


@triton.jit
def merge_tokens_kernel(
    features, importance, index, slot, members, order, survivors, merged, summed,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, ROW_TILE: tl.constexpr, STAGES: tl.constexpr,
    MERGING: tl.constexpr, ALONE_TILE: tl.constexpr, SEARCH_TILE: tl.constexpr,
):  # fmt: skip
    """Σ w x / Σ w over a survivor and its members, w = max(s, 0) + ε; a survivor alone is copied bit for bit. ``slot`` is for other engines."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    wanted = tl.program_id(1)  # of the survivors that are not alone, counted from 0
    merging = MERGING + survivors // ALONE_TILE  # programs for these
    if wanted >= merging:
        _copy_alone(features, importance, index, members, survivors, merged, summed, column, (wanted - merging) * ALONE_TILE, F, ALONE_TILE)
    else:
        crowded_before = 0
        members_before = 0
        for first in range(0, survivors, SEARCH_TILE):
            candidate = first + tl.arange(0, SEARCH_TILE)
            sizes = tl.load(members + candidate, mask=candidate < survivors, other=0).to(tl.int32)
            crowded = sizes > 1
            number = crowded_before + tl.cumsum(crowded.to(tl.int32), 0) - 1
            crowded_before += tl.sum(crowded.to(tl.int32), 0)
            while wanted < crowded_before:
                survivor = tl.sum(tl.where(crowded & (number == wanted), candidate, 0), 0)
                size = tl.sum(tl.where(candidate == survivor, sizes, 0), 0)
                start = members_before + tl.sum(tl.where(candidate < survivor, sizes, 0), 0)
                _merge_group(features, importance, order, start, size, survivor, merged, summed, column, F, FLOOR, TILE, ROW_TILE, STAGES)
                wanted += merging
            members_before += tl.sum(sizes, 0)


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
    widest = 128 if precision == "fp32" else 256  # of 512 bytes; the 3 tiles of 16 rows that are on their way take 24 KB of shared memory
    tile = min(triton.next_power_of_2(values["F"]), widest)
    rows = min(16 * widest // tile, 256)
    searching = {"MERGING": 32, "ALONE_TILE": 16, "SEARCH_TILE": 1024}
    return {"F": values["F"], "FLOOR": values["floor"], "TILE": tile, "ROW_TILE": rows, "STAGES": 4, **searching}


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
        ArgumentSpec("order", "int64", ("N",)),
    ),
    sizes={"survivors": "M"},
    outputs=(ArgumentSpec("merged", "T", ("M", "F")), ArgumentSpec("summed", "float32", ("M",))),
    grid=("(F + TILE - 1) // TILE", "MERGING + M // ALONE_TILE + (M + ALONE_TILE - 1) // ALONE_TILE", "1"),
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
