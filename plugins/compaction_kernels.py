"""What becomes of the tokens, on the GPU (definitions in ``compaction.py``): one pass over the features.

``merge_tokens``: three kinds of survivors, by how many tokens they stand for. Large groups come first in the grid, since they take longest: a program
has a narrow tile of columns and reads the rows that ``group_tokens`` has listed several tiles ahead. Then blocks of survivors in wide tiles of
columns: those that are alone are copied together, small groups are added one after another. Every feature is read once and written once, and
sums have a fixed order, so results repeat bit for bit.
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
def _weights(score, there, FLOOR: tl.constexpr):
    return tl.where(there, tl.maximum(score, 0.0) + FLOOR, 0.0)


@triton.jit
def _find_large(members, survivors, wanted, SMALL: tl.constexpr, SEARCH_TILE: tl.constexpr):
    """The survivor with the large group of this number, from 0; −1 where there are fewer."""
    found = -1
    seen = 0
    for first in range(0, survivors, SEARCH_TILE):
        candidate = first + tl.arange(0, SEARCH_TILE)
        large = (tl.load(members + candidate, mask=candidate < survivors, other=0) > SMALL).to(tl.int32)
        number = seen + tl.cumsum(large, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((large > 0) & (number == wanted), candidate, -1), 0))
        seen += tl.sum(large, 0)
    return found


@triton.jit
def _merge_large(
    features, importance, order, begin, size, survivor, merged, summed, column,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, ROW_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The ``size`` tokens from ``order[begin]`` on, as one. Each lane of a tile has its own sums; loads run ``STAGES`` tiles ahead."""
    total = tl.zeros((ROW_TILE, TILE), tl.float32)
    total_weight = tl.zeros((ROW_TILE,), tl.float32)
    total_importance = tl.zeros((ROW_TILE,), tl.float32)
    for first in tl.range(0, size, ROW_TILE, num_stages=STAGES):
        place = first + tl.arange(0, ROW_TILE)
        token = tl.load(order + begin + tl.minimum(place, size - 1))  # past the end the last one again, which counts for nothing
        score = tl.load(importance + token)
        source = features + token[:, None] * F + column[None, :]
        rows = tl.load(source) if F % TILE == 0 else tl.load(source, mask=(column < F)[None, :], other=0.0)
        weight = _weights(score, place < size, FLOOR)
        total += rows.to(tl.float32) * weight[:, None]
        total_weight += weight
        total_importance += tl.where(place < size, score, 0.0)
    mean = tl.sum(total, 0) / tl.sum(total_weight, 0)
    tl.store(merged + survivor.to(tl.int64) * F + column, mean.to(merged.dtype.element_ty), mask=column < F)
    if tl.program_id(0) % ((F + TILE - 1) // TILE) == 0:
        tl.store(summed + survivor, tl.sum(total_importance, 0))


@triton.jit
def _merge_small(
    features, importance, order, begin, size, survivor, merged, summed, column,
    F: tl.constexpr, FLOOR: tl.constexpr, WIDE_TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The same for a few tokens: each thread has columns of its own, so that nothing passes between threads."""
    total = tl.zeros((WIDE_TILE,), tl.float32)
    total_weight = 0.0
    total_importance = 0.0
    for first in range(0, size, FEW):
        for number in tl.static_range(FEW):  # loads that do not wait for each other
            place = first + number
            token = tl.load(order + begin + tl.minimum(place, size - 1))
            score = tl.load(importance + token)
            row = tl.load(features + token * F + column, mask=column < F, other=0.0)
            weight = _weights(score, place < size, FLOOR)
            total += row.to(tl.float32) * weight
            total_weight += weight
            total_importance += tl.where(place < size, score, 0.0)
    target = merged + tl.full((), survivor, tl.int64) * F + column
    tl.store(target, (total / total_weight).to(merged.dtype.element_ty), mask=column < F)
    tl.store(summed + survivor, total_importance)


@triton.jit
def _copy_alone(features, importance, members, order, start, first, survivors, merged, summed, column, F: tl.constexpr, BLOCK: tl.constexpr):
    """Those of the survivors from ``first`` on that are alone, bit for bit."""
    survivor = first + tl.arange(0, BLOCK)
    alone = tl.load(members + survivor, mask=survivor < survivors, other=0) == 1
    token = tl.load(order + tl.load(start + survivor, mask=alone, other=0), mask=alone, other=0)
    inside = alone[:, None] & (column < F)[None, :]
    rows = tl.load(features + token[:, None] * F + column[None, :], mask=inside)
    tl.store(merged + survivor.to(tl.int64)[:, None] * F + column[None, :], rows, mask=inside)
    tl.store(summed + survivor, tl.load(importance + token, mask=alone), mask=alone)


@triton.jit
def merge_tokens_kernel(
    features, importance, index, slot, members, order, start, survivors, merged, summed,
    F: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr, ROW_TILE: tl.constexpr, STAGES: tl.constexpr,
    LARGE: tl.constexpr, SEARCH_TILE: tl.constexpr, WIDE_TILE: tl.constexpr, FEW: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ w x / Σ w over a survivor and its members, w = max(s, 0) + ε; a survivor alone is copied bit for bit.

    ``index`` and ``slot`` are for engines without kernels.
    """
    program = tl.program_id(0)
    tiles: tl.constexpr = (F + TILE - 1) // TILE
    wide_tiles: tl.constexpr = (F + WIDE_TILE - 1) // WIDE_TILE
    if program < LARGE * tiles:
        column = program % tiles * TILE + tl.arange(0, TILE)
        wanted = program // tiles
        survivor = _find_large(members, survivors, wanted, SMALL, SEARCH_TILE)
        while survivor >= 0:
            begin, size = tl.load(start + survivor), tl.load(members + survivor).to(tl.int32)
            _merge_large(features, importance, order, begin, size, survivor, merged, summed, column, F, FLOOR, TILE, ROW_TILE, STAGES)
            wanted += LARGE
            survivor = _find_large(members, survivors, wanted, SMALL, SEARCH_TILE)
    else:
        rest = program - LARGE * tiles
        columns = rest % wide_tiles * WIDE_TILE + tl.arange(0, WIDE_TILE)
        block = rest // wide_tiles * BLOCK
        _copy_alone(features, importance, members, order, start, block, survivors, merged, summed, columns, F, BLOCK)
        for few in range(block, tl.minimum(block + BLOCK, survivors)):
            few_size = tl.load(members + few).to(tl.int32)
            if (few_size > 1) & (few_size <= SMALL):
                few_begin = tl.load(start + few)
                _merge_small(features, importance, order, few_begin, few_size, few, merged, summed, columns, F, FLOOR, WIDE_TILE, FEW)


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
    columns = triton.next_power_of_2(values["F"])
    tile = min(columns, widest)
    large = {"TILE": tile, "ROW_TILE": min(16 * widest // tile, 256), "STAGES": 4, "LARGE": 32, "SEARCH_TILE": 1024}
    small = {"WIDE_TILE": min(columns, 4 * widest), "FEW": 8, "SMALL": 32, "BLOCK": 4}  # 16 bytes a thread and row
    return {"F": values["F"], "FLOOR": values["floor"], **large, **small}


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
        ArgumentSpec("start", "int64", ("M",)),
    ),
    sizes={"survivors": "M"},
    outputs=(ArgumentSpec("merged", "T", ("M", "F")), ArgumentSpec("summed", "float32", ("M",))),
    grid=("LARGE * ((F + TILE - 1) // TILE) + (M + BLOCK - 1) // BLOCK * ((F + WIDE_TILE - 1) // WIDE_TILE)", "1", "1"),
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
