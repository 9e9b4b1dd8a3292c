"""Which tokens survive, and whose each token is, on the GPU (definitions in ``compaction.py``): exact, so bit for bit what the reference selects.

A selection is one program, since every decision needs all tokens: a radix search over the ordered bits of the keys finds the threshold, a
running count settles ties in favour of lower indices and numbers the survivors. Everything is integer arithmetic. With N up to a few
thousand tokens this is a matter of microseconds to a fraction of a millisecond; there is no workspace, ``slot`` holds what later passes need.

``group_tokens``: one program a survivor; few look through ``slot``, since most survivors are alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec

__all__ = ["GROUP_TOKENS", "KEEP_TOP", "KEEP_TOP_PER_CELL", "KERNELS"]

DIGITS = tl.constexpr(256)  # each of 4 passes settles 8 bits of the threshold
LOWEST = tl.constexpr(-(1 << 31))
KEPT, REPRESENTATIVE, REST = tl.constexpr(2), tl.constexpr(1), tl.constexpr(0)
RANK_SPAN = tl.constexpr(1 << 32)  # a token's rank within a cell is one int64: ordered bits above, complement of the index below
INDEX_MASK = tl.constexpr((1 << 31) - 1)
NO_RANK = tl.constexpr(-(1 << 63))


@triton.jit
def _ordered_bits(values, token, tokens):
    """float32 as int32 with the same order (−0 equals 0), sign-extended to int64; LOWEST outside. → int64 [TILE]"""
    value = tl.load(values + token, mask=token < tokens, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.int64)


@triton.jit
def _in_class(slot, token, tokens, wanted, HAS_CLASSES: tl.constexpr):
    """Tokens of one class; all of them before there are classes."""
    inside = token < tokens
    if HAS_CLASSES:
        inside &= tl.load(slot + token, mask=inside, other=-1) == wanted
    return inside


@triton.jit
def _threshold(values, slot, tokens, wanted, count, HAS_CLASSES: tl.constexpr, TILE: tl.constexpr):
    """The ``count``-th largest key of a class (any, where count is 0), and how many keys equal to it are among the first ``count``."""
    digit = tl.arange(0, DIGITS)
    prefix = tl.full((), 0, tl.int64)
    left = count
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros((DIGITS,), tl.int32)
        for start in range(0, tokens, TILE):
            token = start + tl.arange(0, TILE)
            bits = _ordered_bits(values, token, tokens) - LOWEST  # from 0
            eligible = _in_class(slot, token, tokens, wanted, HAS_CLASSES) & ((bits >> (shift + 8)) == prefix)
            counts += tl.histogram(((bits >> shift) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=eligible)
        reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys of this digit or a larger one
        chosen = tl.max(tl.where(reached >= left, digit, 0), 0)
        left -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        prefix = prefix * DIGITS + chosen
    return prefix + LOWEST, left


@triton.jit
def keep_top_kernel(key, survivors, tokens, count, index, TILE: tl.constexpr):
    """Indices of the ``count`` largest keys, ascending."""
    threshold, ties = _threshold(key, index, tokens, REST, count, False, TILE)
    ties_seen = 0
    placed = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        bits = _ordered_bits(key, token, tokens)
        equal = (inside & (bits == threshold)).to(tl.int32)
        taken = inside & ((bits > threshold) | ((equal > 0) & (ties_seen + tl.cumsum(equal, 0) <= ties)))
        place = placed + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(index + place, token.to(tl.int64), mask=taken)
        ties_seen += tl.sum(equal, 0)
        placed += tl.sum(taken.to(tl.int32), 0)


@triton.jit
def keep_top_per_cell_kernel(
    importance, cell, cells, survivors, tokens, cell_total, count, index, slot, members,
    TILE: tl.constexpr, CELL_TILE: tl.constexpr, NARROW_TILE: tl.constexpr,
):  # fmt: skip
    """Kept tokens, then one representative a cell, then the rest; ``slot`` holds the class, then place and class, then the result."""
    # Kept: the K0 = max(0, count − cells) most important.
    kept_total = tl.maximum(count - cell_total, 0)
    threshold, ties = _threshold(importance, slot, tokens, REST, kept_total, False, TILE)
    ties_seen = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        bits = _ordered_bits(importance, token, tokens)
        equal = (inside & (bits == threshold)).to(tl.int32)
        kept = (bits > threshold) | ((equal > 0) & (ties_seen + tl.cumsum(equal, 0) <= ties))
        tl.store(slot + token, tl.where(kept & (kept_total > 0), KEPT, REST).to(tl.int64), mask=inside)
        ties_seen += tl.sum(equal, 0)
    tl.debug_barrier()

    # Representatives: of the rest, the most important of each cell.
    representatives = 0
    for first in range(0, cell_total, CELL_TILE):
        number = first + tl.arange(0, CELL_TILE)
        best_so_far = tl.full((CELL_TILE, NARROW_TILE), NO_RANK, tl.int64)
        for start in range(0, tokens, NARROW_TILE):
            token = start + tl.arange(0, NARROW_TILE)
            free = _in_class(slot, token, tokens, REST, True)
            home = tl.load(cell + token, mask=token < tokens, other=-1)
            rank = _ordered_bits(importance, token, tokens) * RANK_SPAN + (token ^ INDEX_MASK).to(tl.int64)
            mine = free[None, :] & (home[None, :] == number[:, None])
            best_so_far = tl.maximum(best_so_far, tl.where(mine, rank[None, :], NO_RANK))
        best = tl.max(best_so_far, 1)
        found = (best > NO_RANK) & (number < cell_total)
        winner = (best & INDEX_MASK) ^ INDEX_MASK
        tl.debug_barrier()  # nobody may still read the classes of this tile
        tl.store(slot + winner, tl.full((CELL_TILE,), REPRESENTATIVE, tl.int64), mask=found)
        representatives += tl.sum(found.to(tl.int32), 0)
    tl.debug_barrier()

    # The last class that survives does so by importance only in part.
    cells_win = kept_total + representatives >= count
    contested = tl.where(cells_win, REPRESENTATIVE, REST)
    left = tl.where(cells_win, count - kept_total, count - kept_total - representatives)
    threshold, ties = _threshold(importance, slot, tokens, contested, left, True, TILE)
    ties_seen = 0
    placed = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        bits = _ordered_bits(importance, token, tokens)
        rank = tl.load(slot + token, mask=inside, other=REST)
        open_here = inside & (rank == contested)
        equal = (open_here & (bits == threshold)).to(tl.int32)
        taken = open_here & ((bits > threshold) | ((equal > 0) & (ties_seen + tl.cumsum(equal, 0) <= ties)))
        taken |= inside & (rank > contested)
        place = placed + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(index + place, token.to(tl.int64), mask=taken)
        tl.store(members + place, tl.full((TILE,), 1, tl.int64), mask=taken)
        state = tl.where(taken, 2 * (place + 1), 0) + (rank == REPRESENTATIVE).to(tl.int32)
        tl.debug_barrier()
        tl.store(slot + token, state.to(tl.int64), mask=inside)
        ties_seen += tl.sum(equal, 0)
        placed += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()

    # Everyone's slot: its own place, or that of its cell's representative, −1 where that did not survive; and the members of each of these.
    for first in range(0, cell_total, CELL_TILE):
        number = first + tl.arange(0, CELL_TILE)
        targets = tl.zeros((CELL_TILE, NARROW_TILE), tl.int32)
        losses = tl.zeros((CELL_TILE, NARROW_TILE), tl.int32)
        for start in range(0, tokens, NARROW_TILE):
            token = start + tl.arange(0, NARROW_TILE)
            home = tl.load(cell + token, mask=token < tokens, other=-1)
            state = tl.load(slot + token, mask=token < tokens, other=0).to(tl.int32)
            mine = home[None, :] == number[:, None]
            targets = tl.maximum(targets, tl.where(mine & (state & 1 == 1)[None, :], (state >> 1)[None, :], 0))
            losses += (mine & (state <= 1)[None, :]).to(tl.int32)
        target = tl.max(targets, 1)
        tl.store(members + target - 1, (tl.sum(losses, 1) + 1).to(tl.int64), mask=target > 0)
        tl.debug_barrier()
        for start in range(0, tokens, NARROW_TILE):
            token = start + tl.arange(0, NARROW_TILE)
            home = tl.load(cell + token, mask=token < tokens, other=-1)
            state = tl.load(slot + token, mask=token < tokens, other=0)
            here = (token < tokens) & (home >= first) & (home < first + CELL_TILE)
            homes_place = tl.gather(target, tl.where(here, home - first, 0).to(tl.int32), 0)
            tl.debug_barrier()
            tl.store(slot + token, tl.where(state > 1, state >> 1, homes_place) - 1, mask=here)
        tl.debug_barrier()


@triton.jit
def group_tokens_kernel(index, slot, members, tokens, survivors, order, TILE: tl.constexpr):
    """The tokens of one survivor, or after the last those of none, in ascending order behind those of the survivors before it."""
    survivor = tl.program_id(0)
    start = 0
    for first in range(0, survivor, TILE):
        before = first + tl.arange(0, TILE)
        start += tl.sum(tl.load(members + before, mask=before < survivor, other=0).to(tl.int32), 0)
    size = tokens - start
    if survivor < survivors:
        size = tl.load(members + survivor).to(tl.int32)
    if (survivor < survivors) & (size == 1):
        tl.store(order + start, tl.load(index + survivor))
    else:
        wanted = tl.where(survivor < survivors, survivor, -1)
        found = 0
        first = 0
        while (found < size) & (first < tokens):
            token = first + tl.arange(0, TILE)
            mine = (tl.load(slot + token, mask=token < tokens, other=-2) == wanted).to(tl.int32)
            place = start + found + tl.cumsum(mine, 0) - 1
            tl.store(order + place, token.to(tl.int64), mask=mine > 0)
            found += tl.sum(mine, 0)
            first += TILE


def _keep_top_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {"TILE": 2048}


def _per_cell_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {"TILE": 2048, "CELL_TILE": 32, "NARROW_TILE": 256}


def _group_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {"TILE": 2048}


KEEP_TOP = KernelSpec(
    op="KeepTop",
    kernel=keep_top_kernel,
    inputs=(ArgumentSpec("key", "float32", ("S",)), ArgumentSpec("survivors", "int32", ("M",))),
    sizes={"tokens": "S", "count": "M"},
    outputs=(ArgumentSpec("index", "int64", ("M",)),),
    grid=("1", "1", "1"),
    constants=_keep_top_constants,
    num_warps=8,
)
KEEP_TOP_PER_CELL = KernelSpec(
    op="KeepTopPerCell",
    kernel=keep_top_per_cell_kernel,
    inputs=(
        ArgumentSpec("importance", "float32", ("N",)),
        ArgumentSpec("cell", "int64", ("N",)),
        ArgumentSpec("cells", "int64", ("C",)),
        ArgumentSpec("survivors", "int32", ("M",)),
    ),
    sizes={"tokens": "N", "cell_total": "C", "count": "M"},
    outputs=(ArgumentSpec("index", "int64", ("M",)), ArgumentSpec("slot", "int64", ("N",)), ArgumentSpec("members", "int64", ("M",))),
    grid=("1", "1", "1"),
    constants=_per_cell_constants,
    num_warps=16,
)
GROUP_TOKENS = KernelSpec(
    op="GroupTokens",
    kernel=group_tokens_kernel,
    inputs=(ArgumentSpec("index", "int64", ("M",)), ArgumentSpec("slot", "int64", ("N",)), ArgumentSpec("members", "int64", ("M",))),
    sizes={"tokens": "N", "survivors": "M"},
    outputs=(ArgumentSpec("order", "int64", ("N",)),),
    grid=("M + 1", "1", "1"),
    constants=_group_constants,
    num_warps=8,
)
KERNELS = (KEEP_TOP, KEEP_TOP_PER_CELL, GROUP_TOKENS)
