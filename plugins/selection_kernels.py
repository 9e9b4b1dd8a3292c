"""Which tokens survive, and whose each token is, on the GPU (definitions in ``compaction.py``): exact, so bit for bit what the reference selects.

A selection is one program, since every decision needs all tokens: a radix search over the ordered bits of the keys finds the threshold, a
running count settles ties in favour of lower indices and numbers the survivors. Everything is integer arithmetic, so largest ranks of cells and
counts of members can be found by atomics, whatever their order. Every pass is over the tokens, or over the cells, once; there is no workspace:
``slot`` and ``home`` hold what later passes need.

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
def _fill(target, length, value: tl.constexpr, TILE: tl.constexpr):
    for first in range(0, length, TILE):
        place = first + tl.arange(0, TILE)
        tl.store(target + place, tl.full((TILE,), value, tl.int64), mask=place < length)


@triton.jit
def _of_cell(home, cell, token, tokens):
    """What ``home`` holds for the tokens' cells; past the first-level cache, which knows nothing of atomics. → int64 [TILE]"""
    inside = token < tokens
    return tl.load(home + tl.load(cell + token, mask=inside, other=0), mask=inside, other=-1, cache_modifier=".cg")


@triton.jit
def keep_top_per_cell_kernel(
    importance, cell, cells, survivors, tokens, cell_total, count, index, slot, members, home, TILE: tl.constexpr
):  # fmt: skip
    """Kept tokens, then one representative a cell, then the rest.

    Until the end ``slot`` holds a token's class, then its place and class, and ``home`` the best rank of a cell's tokens that are not kept.
    """
    # Kept: the K0 = max(0, count − cells) most important. Of the others the most important of each cell is its representative.
    _fill(home, cell_total, NO_RANK, TILE)
    kept_total = tl.maximum(count - cell_total, 0)
    threshold, ties = _threshold(importance, slot, tokens, REST, kept_total, False, TILE)
    tl.debug_barrier()
    ties_seen = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < tokens
        bits = _ordered_bits(importance, token, tokens)
        equal = (inside & (bits == threshold)).to(tl.int32)
        kept = ((bits > threshold) | ((equal > 0) & (ties_seen + tl.cumsum(equal, 0) <= ties))) & (kept_total > 0)
        tl.store(slot + token, tl.where(kept, KEPT, REST).to(tl.int64), mask=inside)
        rank = bits * RANK_SPAN + (token ^ INDEX_MASK).to(tl.int64)
        tl.atomic_max(home + tl.load(cell + token, mask=inside, other=0), rank, mask=inside & (kept == 0), sem="relaxed")
        ties_seen += tl.sum(equal, 0)
    tl.debug_barrier()
    representatives = 0
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        best = _of_cell(home, cell, token, tokens)
        is_best = (token < tokens) & ((best & INDEX_MASK) ^ INDEX_MASK == token)  # no token has the number that NO_RANK holds
        tl.store(slot + token, tl.full((TILE,), REPRESENTATIVE, tl.int64), mask=is_best)
        representatives += tl.sum(is_best.to(tl.int32), 0)
    tl.debug_barrier()

    # The last class that survives does so by importance only in part.
    cells_win = kept_total + representatives >= count
    contested = tl.where(cells_win, REPRESENTATIVE, REST)
    left = tl.where(cells_win, count - kept_total, count - kept_total - representatives)
    threshold, ties = _threshold(importance, slot, tokens, contested, left, True, TILE)
    _fill(home, cell_total, -1, TILE)
    tl.debug_barrier()
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
        is_home = taken & (rank == REPRESENTATIVE)
        tl.store(home + tl.load(cell + token, mask=is_home, other=0), place.to(tl.int64), mask=is_home)
        tl.debug_barrier()
        tl.store(slot + token, tl.where(taken, place, -1).to(tl.int64), mask=inside)
        ties_seen += tl.sum(equal, 0)
        placed += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()

    # Who does not survive goes to its cell's representative, or nowhere where that did not survive.
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        lost = tl.load(slot + token, mask=token < tokens, other=0) < 0
        target = _of_cell(home, cell, token, tokens)
        tl.debug_barrier()
        tl.store(slot + token, target, mask=lost)
        tl.atomic_add(members + target, tl.full((TILE,), 1, tl.int64), mask=lost & (target >= 0), sem="relaxed")


@triton.jit
def group_tokens_kernel(index, slot, members, tokens, survivors, order, start, TILE: tl.constexpr):
    """The tokens of one survivor, or after the last those of none, in ascending order behind those of the survivors before it."""
    survivor = tl.program_id(0)
    begin = 0
    for first in range(0, survivor, TILE):
        before = first + tl.arange(0, TILE)
        begin += tl.sum(tl.load(members + before, mask=before < survivor, other=0).to(tl.int32), 0)
    size = tokens - begin
    if survivor < survivors:
        size = tl.load(members + survivor).to(tl.int32)
        tl.store(start + survivor, begin)
    if (survivor < survivors) & (size == 1):
        tl.store(order + begin, tl.load(index + survivor))
    else:
        wanted = tl.where(survivor < survivors, survivor, -1)
        found = 0
        first = 0
        while (found < size) & (first < tokens):
            token = first + tl.arange(0, TILE)
            mine = (tl.load(slot + token, mask=token < tokens, other=-2) == wanted).to(tl.int32)
            place = begin + found + tl.cumsum(mine, 0) - 1
            tl.store(order + place, token.to(tl.int64), mask=mine > 0)
            found += tl.sum(mine, 0)
            first += TILE


def _constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {"TILE": 2048}


KEEP_TOP = KernelSpec(
    op="KeepTop",
    kernel=keep_top_kernel,
    inputs=(ArgumentSpec("key", "float32", ("S",)), ArgumentSpec("survivors", "int32", ("M",))),
    sizes={"tokens": "S", "count": "M"},
    outputs=(ArgumentSpec("index", "int64", ("M",)),),
    grid=("1", "1", "1"),
    constants=_constants,
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
    outputs=(
        ArgumentSpec("index", "int64", ("M",)),
        ArgumentSpec("slot", "int64", ("N",)),
        ArgumentSpec("members", "int64", ("M",)),
        ArgumentSpec("home", "int64", ("C",)),
    ),
    grid=("1", "1", "1"),
    constants=_constants,
    num_warps=16,
)
GROUP_TOKENS = KernelSpec(
    op="GroupTokens",
    kernel=group_tokens_kernel,
    inputs=(ArgumentSpec("index", "int64", ("M",)), ArgumentSpec("slot", "int64", ("N",)), ArgumentSpec("members", "int64", ("M",))),
    sizes={"tokens": "N", "survivors": "M"},
    outputs=(ArgumentSpec("order", "int64", ("N",)), ArgumentSpec("start", "int64", ("M",))),
    grid=("M + 1", "1", "1"),
    constants=_constants,
    num_warps=8,
)
KERNELS = (KEEP_TOP, KEEP_TOP_PER_CELL, GROUP_TOKENS)
