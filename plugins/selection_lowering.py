"""Other function bodies of the selections, for engines whose TopK will not do (definitions in ``compaction.py``).

TensorRT and TensorRT-RTX take no TopK beyond 3,840, which shows when the engine runs and not when it is built, and promise nothing about
ties. Here a token's rank is the number of tokens ahead of it, by comparison of all pairs: exact, whatever the ties, and for any number of
tokens; N² comparisons that a compiler fuses with their sum. ONNX Runtime, which does not fuse, has the bodies in ``compaction.py``.
"""

from __future__ import annotations

from .compaction import GROUP_KEY, MEMBERS
from .node import function_body

__all__ = ["FUNCTIONS", "TOP_K_LIMIT"]

TOP_K_LIMIT = 3840  # of TensorRT's TopK layer

# j is ahead of i: a larger key, or an equal one at a lower index.
RANK = """
    zero = Constant <value_ints: ints = [0]>()
    one = Constant <value_ints: ints = [1]>()
    axis = Constant <value_int: int = 0>()
    first = Constant <value_int: int = 0>()
    step = Constant <value_int: int = 1>()
    tokens = Shape({key})
    token_total = Squeeze(tokens, zero)
    number = Range(first, token_total, step)
    number_row = Unsqueeze(number, zero)
    number_column = Unsqueeze(number, one)
    key_row = Unsqueeze({key}, zero)
    key_column = Unsqueeze({key}, one)
    larger = Greater(key_row, key_column)
    equal = Equal(key_row, key_column)
    earlier = Less(number_row, number_column)
    tied = And(equal, earlier)
    ahead = Or(larger, tied)
    ahead_int = Cast <to: int = 7>(ahead)
    rank = ReduceSum <keepdims: int = 0>(ahead_int, one)
"""
# A permutation: survivors write their number to their place, the others to the places behind, which are cut off. (TensorRT scatters no more
# elements than there is room for, and gives no order to those that meet in one place.)
PLACE = """
    survives_int = Cast <to: int = 7>(survives)
    counted = CumSum(survives_int, axis)
    place = Sub(counted, one)
    dropped_before = Sub(number, counted)
    place_behind = Add(count, dropped_before)
    target = Where(survives, place, place_behind)
    blank = Expand(zero, tokens)
    written = ScatterElements <axis: int = 0>(blank, target, number)
    index = Slice(written, zero, count, zero)
"""

KEEP_TOP = function_body(
    "KeepTop (key, survivors) => (index) {\n    count = Shape(survivors)" + RANK.format(key="key") + "    survives = Less(rank, count)" + PLACE + "}"
)

KEEP_TOP_PER_CELL = function_body(
    "KeepTopPerCell (importance, cell, cells, survivors) => (index, slot, members, home) {\n    count = Shape(survivors)"
    + RANK.format(key="importance")
    + """
    cell_total = Shape(cells)
    minus_one = Constant <value_ints: ints = [-1]>()
    spare = Sub(count, cell_total)
    kept_total = Max(spare, zero)
    kept = Less(rank, kept_total)
    candidate = Where(kept, tokens, rank)
    cell_row = Unsqueeze(cell, zero)
    cells_column = Unsqueeze(cells, one)
    inside = Equal(cells_column, cell_row)
    candidate_row = Unsqueeze(candidate, zero)
    candidates = Where(inside, candidate_row, tokens)
    best = ReduceMin <keepdims: int = 0>(candidates, one)
    best_of_token = Gather <axis: int = 0>(best, cell)
    is_best = Equal(rank, best_of_token)
    free = Not(kept)
    representative = And(free, is_best)

    two = Constant <value_ints: ints = [2]>()
    kept_int = Cast <to: int = 7>(kept)
    representative_int = Cast <to: int = 7>(representative)
    twice = Mul(two, tokens)
    kept_key = Mul(kept_int, twice)
    representative_key = Mul(representative_int, tokens)
    class_key = Add(kept_key, representative_key)
    sort_key = Sub(class_key, rank)
    sort_row = Unsqueeze(sort_key, zero)
    sort_column = Unsqueeze(sort_key, one)
    before = Greater(sort_row, sort_column)
    before_int = Cast <to: int = 7>(before)
    order = ReduceSum <keepdims: int = 0>(before_int, one)
    survives = Less(order, count)
"""
    + PLACE
    + """
    is_target = And(representative, survives)
    target_place = Where(is_target, place, minus_one)
    target_row = Unsqueeze(target_place, zero)
    targets = Where(inside, target_row, minus_one)
    home = ReduceMax <keepdims: int = 0>(targets, one)
    merged_place = Gather <axis: int = 0>(home, cell)
    slot = Where(survives, place, merged_place)
"""
    + MEMBERS
    + "}"
)

# A token's place is the number of tokens ahead of it; those are a permutation.
GROUP_TOKENS = function_body(
    "GroupTokens (index, slot, members) => (order, start) {"
    + GROUP_KEY
    + "    key = Neg(group)"
    + RANK.format(key="key")
    + """
    blank = Expand(zero, tokens)
    order = ScatterElements <axis: int = 0>(blank, rank, number)
    start = CumSum <exclusive: int = 1>(members, axis)
}
"""
)

FUNCTIONS = (KEEP_TOP, KEEP_TOP_PER_CELL, GROUP_TOKENS)
