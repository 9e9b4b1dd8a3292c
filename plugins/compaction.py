"""Token compaction: which tokens survive, and what becomes of the rest (docs/algorithm.md, sections 2 and 3).

    KeepTop          index = the ``count`` largest keys, ties to the lower index, ascending
    KeepTopPerCell   the exact-budget form of VFlowOpt's prune-and-recycle: kept tokens, then one representative a grid cell
    GroupTokens      the tokens of each survivor beside each other
    MergeTokens      each non-survivor is merged into the representative of its cell: Σ w x / Σ w, w = max(s, 0) + ε
    GatherTokens     hidden states, rotary tables and ranking keys of the survivors, together

Ranks are integers and keys are built from ranks, never from sums of scores: selection is exact in every form, and the
same importance gives the same survivors bit for bit. VFlowOpt (arXiv 2508.05211), section 3.3; the exact budget is this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .node import emit, function_body, is_tracing, length_vector
from .torch_ops import register

__all__ = ["FUNCTIONS", "MEMBERS", "WEIGHT_FLOOR", "gather_tokens", "group_tokens", "keep_top", "keep_top_per_cell", "merge_by_slot", "merge_tokens"]

Size = int | torch.SymInt

WEIGHT_FLOOR = 1e-8  # ε: below any importance that matters (about 1/P), and a cell of zeros still has a mean


def keep_top(key: Tensor, count: Size) -> Tensor:
    """Indices of the ``count`` largest keys, ascending; of equal keys the lower index wins.

    Args:
        key: float32 [S]; +inf is allowed, NaN is not.

    Returns:
        int64 [count].
    """
    if is_tracing():
        return emit("KeepTop", (key, length_vector(count, key)), {}, [(torch.int64, (count,))])[0]
    index: Tensor = _keep_top(key, length_vector(count, key))
    return index


def _reference_keep_top(key: Tensor, survivors: Tensor) -> Tensor:
    order = torch.sort(key, descending=True, stable=True).indices
    return order[: survivors.shape[0]].sort().values


def keep_top_per_cell(importance: Tensor, cell: Tensor, cells: Tensor, count: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Survivors of an exact budget with one representative a grid cell, and where every token goes.

    With M = ``count`` and C cells, the K0 = max(0, M − C) most important tokens are kept; of the rest, the most important token of
    each cell is its representative. Survivors are the first M of: kept, representatives, the rest, each by importance, ties to
    the lower index.

    Args:
        importance: float32 [N]; cell: int64 [N], cell of each token; cells: int64 [C] = 0, 1, …, C − 1.

    Returns:
        index int64 [M] ascending; slot int64 [N]: the place in ``index`` of the survivor that a token is merged into (its
        own for a survivor), −1 where the cell's representative did not survive; members int64 [M]: how many tokens have each slot.
        The op has a fourth output, home int64 [C]: the slot of those of a cell that do not survive themselves. Kernels need its memory.
    """
    given = importance, cell, cells, length_vector(count, importance)
    if is_tracing():
        outputs = [(torch.int64, shape) for shape in ((count,), importance.shape, (count,), cells.shape)]
        index, slot, members, _ = emit("KeepTopPerCell", given, {}, outputs)
    else:
        index, slot, members, _ = _keep_top_per_cell(*given)
    return index, slot, members


def _reference_keep_top_per_cell(importance: Tensor, cell: Tensor, cells: Tensor, survivors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = survivors.shape[0]
    tokens, cell_total = importance.shape[0], cells.shape[0]
    order = torch.sort(importance, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    kept = rank < max(0, count - cell_total)
    candidate = torch.where(kept, tokens, rank)
    best = torch.full((cell_total,), tokens, device=rank.device).scatter_reduce_(0, cell, candidate, "amin")
    representative = ~kept & (rank == best[cell])
    key = 2 * tokens * kept.long() + tokens * representative.long() - rank  # all different
    index = key.topk(count).indices.sort().values
    place = torch.full((tokens,), -1, device=rank.device).scatter_(0, index, torch.arange(count, device=rank.device))
    home = torch.full((cell_total,), -1, device=rank.device).scatter_reduce_(0, cell, torch.where(representative, place, -1), "amax")
    slot = torch.where(place >= 0, place, home[cell])
    return index, slot, _count_members(slot, count), home


def _count_members(slot: Tensor, survivors: int) -> Tensor:
    return torch.bincount(slot[slot >= 0], minlength=survivors)


def group_tokens(index: Tensor, slot: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in the order of their slots: those of survivor 0, then of 1, …, and last those that have none.

    A group of its own for each survivor is what lets a kernel read a survivor's tokens without looking for them.

    Args:
        index: int64 [M]; slot: int64 [N]; members: int64 [M], as from ``keep_top_per_cell``.

    Returns:
        order int64 [N], a permutation, ascending within a slot; start int64 [M] = Σ ``members[:m]``: survivor m has
        ``order[start[m] : start[m] + members[m]]``.
    """
    if is_tracing():
        order, start = emit("GroupTokens", (index, slot, members), {}, [(torch.int64, slot.shape), (torch.int64, index.shape)])
    else:
        order, start = _group_tokens(index, slot, members)
    return order, start


def _reference_group_tokens(index: Tensor, slot: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    return torch.argsort(torch.where(slot < 0, index.shape[0], slot), stable=True), members.cumsum(0) - members


def merge_tokens(
    features: Tensor, importance: Tensor, index: Tensor, slot: Tensor, members: Tensor, order: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Survivors with what was merged into them.

    Args:
        features: [N, F]; importance: float32 [N]; index: int64 [M]; slot: int64 [N]; members: int64 [M], these three from ``keep_top_per_cell``.
        order: int64 [N]; start: int64 [M], from ``group_tokens``: they say what ``slot`` says; kernels read them, standard operators ``slot``.

    Returns:
        merged [M, F] (dtype of ``features``; a survivor alone is copied bit for bit) and the summed importance of each survivor's
        members float32 [M].
    """
    if is_tracing():
        survivors = index.shape[0]
        outputs = [(features.dtype, (survivors, features.shape[1])), (torch.float32, (survivors,))]
        merged, summed = emit("MergeTokens", (features, importance, index, slot, members, order, start), {"floor": WEIGHT_FLOOR}, outputs)
        return merged, summed
    merged, summed = _merge_tokens(features, importance, index, slot, members, order, start, WEIGHT_FLOOR)
    return merged, summed


def _reference_merge_tokens(
    features: Tensor, importance: Tensor, index: Tensor, slot: Tensor, members: Tensor, order: Tensor, start: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    survivors = index.shape[0]
    taken = slot >= 0
    target = slot[taken]
    weight = importance.clamp(min=0) + floor
    total = weight.new_zeros(survivors).index_add_(0, target, weight[taken])
    share = weight[taken] / total[target]
    merged = features.new_zeros(survivors, features.shape[1], dtype=torch.float32)
    merged.index_add_(0, target, features[taken].float() * share[:, None])
    summed = importance.new_zeros(survivors).index_add_(0, target, importance[taken])
    return torch.where(members[:, None] > 1, merged.to(features.dtype), features[index]), summed


def merge_by_slot(features: Tensor, importance: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """``merge_tokens`` for slots of any origin: merged [M, F] from index int64 [M] and slot int64 [N]. Not for tracing."""
    members = _count_members(slot, index.shape[0])
    return merge_tokens(features, importance, index, slot, members, *group_tokens(index, slot, members))[0]


def gather_tokens(hidden: Tensor, cos: Tensor, sin: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A later stage: the rows ``index`` of everything that travels along the sequence.

    Args:
        hidden: [B, S, C]; cos, sin: [B, S, D/2]; key: float32 [S]; index: int64 [M].

    Returns:
        The same four with S replaced by M.
    """
    if is_tracing():
        batch, count = hidden.shape[0], index.shape[0]
        rotary = (cos.dtype, (batch, count, cos.shape[2]))
        outputs = [(hidden.dtype, (batch, count, hidden.shape[2])), rotary, rotary, (torch.float32, (count,))]
        kept = emit("GatherTokens", (hidden, cos, sin, key, index), {}, outputs)
    else:
        kept = _gather_tokens(hidden, cos, sin, key, index)
    return kept[0], kept[1], kept[2], kept[3]


def _reference_gather_tokens(hidden: Tensor, cos: Tensor, sin: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return hidden[:, index], cos[:, index], sin[:, index], key[index]


def _gathered_shapes(hidden: Tensor, cos: Tensor, sin: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    count = index.shape[0]
    rows = (x.new_empty(x.shape[0], count, x.shape[2]) for x in (hidden, cos, sin))
    return *rows, key.new_empty(count)


_keep_top = register(
    "keep_top(Tensor key, Tensor survivors) -> Tensor",
    _reference_keep_top,
    lambda key, survivors: key.new_empty(survivors.shape, dtype=torch.int64),
    "selection_kernels:KEEP_TOP",
)
_keep_top_per_cell = register(
    "keep_top_per_cell(Tensor importance, Tensor cell, Tensor cells, Tensor survivors) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_keep_top_per_cell,
    lambda importance, cell, cells, survivors: tuple(cell.new_empty(x.shape) for x in (survivors, cell, survivors, cells)),
    "selection_kernels:KEEP_TOP_PER_CELL",
)
_group_tokens = register(
    "group_tokens(Tensor index, Tensor slot, Tensor members) -> (Tensor, Tensor)",
    _reference_group_tokens,
    lambda index, slot, members: (slot.new_empty(slot.shape), members.new_empty(members.shape)),
    "selection_kernels:GROUP_TOKENS",
)
_merge_tokens = register(
    "merge_tokens(Tensor features, Tensor importance, Tensor index, Tensor slot, Tensor members, Tensor order, Tensor start, float floor)"
    " -> (Tensor, Tensor)",
    _reference_merge_tokens,
    lambda features, importance, index, slot, members, order, start, floor: (
        features.new_empty(index.shape[0], features.shape[1]),
        importance.new_empty(index.shape),
    ),
    "compaction_kernels:MERGE_TOKENS",
)
_gather_tokens = register(
    "gather_tokens(Tensor hidden, Tensor cos, Tensor sin, Tensor key, Tensor index) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_gather_tokens,
    _gathered_shapes,
    "compaction_kernels:GATHER_TOKENS",
)


KEEP_TOP = function_body("""
KeepTop (key, survivors) => (index) {
    count = Shape(survivors)
    values, order = TopK <axis: int = 0, largest: int = 1, sorted: int = 1>(key, count)
    index, places = TopK <axis: int = 0, largest: int = 0, sorted: int = 1>(order, count)
}
""")

# Of a cell's tokens, those that do not survive themselves are members of its representative, if that survives.
MEMBERS = """
    lost = Not(survives)
    lost_row = Unsqueeze(lost, zero)
    lost_here = And(inside, lost_row)
    lost_int = Cast <to: int = 7>(lost_here)
    cell_lost = ReduceSum <keepdims: int = 0>(lost_int, one)
    token_lost = Gather <axis: int = 0>(cell_lost, cell)
    own_members = Where(is_target, token_lost, zero)
    survivor_lost = Gather <axis: int = 0>(own_members, index)
    members = Add(survivor_lost, one)
"""

KEEP_TOP_PER_CELL = function_body(
    """
KeepTopPerCell (importance, cell, cells, survivors) => (index, slot, members, home) {
    count = Shape(survivors)
    tokens = Shape(importance)
    cell_total = Shape(cells)
    zero = Constant <value_ints: ints = [0]>()
    one = Constant <value_ints: ints = [1]>()
    minus_one = Constant <value_ints: ints = [-1]>()
    values, order = TopK <axis: int = 0, largest: int = 1, sorted: int = 1>(importance, tokens)
    ordered, rank = TopK <axis: int = 0, largest: int = 0, sorted: int = 1>(order, tokens)

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
    top_keys, top_order = TopK <axis: int = 0, largest: int = 1, sorted: int = 1>(sort_key, count)
    index, places = TopK <axis: int = 0, largest: int = 0, sorted: int = 1>(top_order, count)

    least = ReduceMin <keepdims: int = 1>(top_keys, zero)
    survives = GreaterOrEqual(sort_key, least)
    survives_int = Cast <to: int = 7>(survives)
    axis = Constant <value_int: int = 0>()
    counted = CumSum(survives_int, axis)
    place = Sub(counted, one)
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

# What ``GroupTokens`` sorts by: the slot, and behind all of them for tokens that have none.
GROUP_KEY = """
    survivors = Shape(index)
    zero_slot = Constant <value_ints: ints = [0]>()
    has_slot = GreaterOrEqual(slot, zero_slot)
    group = Where(has_slot, slot, survivors)
"""

GROUP_TOKENS = function_body(
    "GroupTokens (index, slot, members) => (order, start) {"
    + GROUP_KEY
    + """
    tokens = Shape(slot)
    groups, order = TopK <axis: int = 0, largest: int = 0, sorted: int = 1>(group, tokens)
    axis = Constant <value_int: int = 0>()
    start = CumSum <exclusive: int = 1>(members, axis)
}
"""
)

MERGE_TOKENS = function_body("""
MergeTokens <floor: float>(features, importance, index, slot, members, order, start) => (merged, summed) {
    zero = Constant <value_ints: ints = [0]>()
    one = Constant <value_ints: ints = [1]>()
    first = Constant <value_int: int = 0>()
    step = Constant <value_int: int = 1>()
    survivors_dim = Shape(index)
    survivors = Squeeze(survivors_dim, zero)
    slots = Range(first, survivors, step)
    slots_column = Unsqueeze(slots, one)
    slot_row = Unsqueeze(slot, zero)
    inside = Equal(slots_column, slot_row)
    inside_float = Cast <to: int = 1>(inside)

    zero_float = Constant <value_float: float = 0.0>()
    floor_value = Constant <value_float: float = @floor>()
    positive = Max(importance, zero_float)
    weight = Add(positive, floor_value)
    weights = Mul(inside_float, weight)
    total = ReduceSum <keepdims: int = 1>(weights, one)
    shares = Div(weights, total)
    features_float = Cast <to: int = 1>(features)
    mixed_float = MatMul(shares, features_float)
    mixed = CastLike(mixed_float, features)
    own = Gather <axis: int = 0>(features, index)
    has_members = Greater(members, one)
    choose = Unsqueeze(has_members, one)
    merged = Where(choose, mixed, own)

    importances = Mul(inside_float, importance)
    summed = ReduceSum <keepdims: int = 0>(importances, one)
}
""")

GATHER_TOKENS = function_body("""
GatherTokens (hidden, cos, sin, key, index) => (hidden_kept, cos_kept, sin_kept, key_kept) {
    hidden_kept = Gather <axis: int = 1>(hidden, index)
    cos_kept = Gather <axis: int = 1>(cos, index)
    sin_kept = Gather <axis: int = 1>(sin, index)
    key_kept = Gather <axis: int = 0>(key, index)
}
""")

FUNCTIONS = (KEEP_TOP, KEEP_TOP_PER_CELL, GROUP_TOKENS, MERGE_TOKENS, GATHER_TOKENS)
