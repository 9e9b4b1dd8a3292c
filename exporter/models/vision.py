"""Tower and merger with what happens to visual tokens before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...plugins.compaction import group_tokens, keep_top, keep_top_per_cell, merge_tokens
from ...plugins.importance import add_entropy, context_relevance
from ..schedule import Schedule, Stage, cell_count, cell_of, keep_count
from ..shape import ModelShape
from ..standard_ops import attention, masked_attention, rms_norm, rotary_embedding

__all__ = ["PROTECTED", "Compacted", "Embedded", "TowerState", "VisionGraph", "pixel_importance"]

TOWER_ROPE_THETA = 10_000.0  # fixed in the architecture
PROTECTED = 1e30  # importance of a token that must survive; far above any score, and finite
ENTROPY_BITS = 8.0  # the most that 256 grey levels can have
NOT_THERE = -3e4  # added to the scores of a window's empty places: no weight is left of it in any precision, and an empty window stays finite


class Windows(NamedTuple):
    """The tokens alive laid out by the windows of their tower, each with room for all its ``window``² tokens; W windows, R = window² · G.

    Attributes:
        slot: int64 [alive], place of each token among W · window².
        cos, sin: T [W, R, head_dim/2]; mask: T [W, 1, R, R], what is added to attention scores.
    """

    slot: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TowerState:
    """What travels along the tower: ``alive`` visual tokens of ``rows`` × ``columns`` original ones.

    Attributes:
        hidden: T [alive · G, C]; cos, sin: T [alive · G, head_dim/2]; entropy: float32 [alive · G] or None.
        importance: float32 [alive], of the last scoring; index: int64 [alive], original indices.
        budget: tokens from which stages count.
        query, key: T [heads, alive · G, head_dim] of the block that was scored last; None before and after a stage.
        windows: None in a tower without.
        size: float32 [alive], tokens that each stands for; None: each for itself, or nobody asks.
        deepstack: T [alive, D · H], what the decoder's first layers add to each token, of the D blocks passed that give it; None before the first.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    entropy: Tensor | None
    importance: Tensor
    index: Tensor
    rows: int
    columns: int
    budget: int
    query: Tensor | None = None
    key: Tensor | None = None
    size: Tensor | None = None
    windows: Windows | None = None
    deepstack: Tensor | None = None

    def row(self, own: Tensor) -> Tensor:
        """What the tokens are [alive, F], with what they have given to DeepStack behind."""
        return own if self.deepstack is None else torch.cat([own, self.deepstack], 1)

    def own(self, features: Tensor) -> Tensor:
        """Of features that a stage gets, what the token itself is: without what DeepStack has put behind."""
        return features if self.deepstack is None else features[:, : features.shape[1] - self.deepstack.shape[1]]


class Compacted(NamedTuple):
    """What a stage has left: features [kept, F], importance float32 [kept], places int64 [kept] among those that were alive, and size as in
    ``TowerState``."""

    features: Tensor
    importance: Tensor
    kept: Tensor
    size: Tensor | None = None


class Embedded(NamedTuple):
    """One picture for the language model: visual_embeds T [M, (1 + D) · H] (D > 0 with DeepStack), importance float32 [M] (zeros where nothing is
    ranked), index int64 [M], ascending; key_bias float32 [M], what the decoder adds to its attention scores of each, None without proportional
    attention."""

    visual_embeds: Tensor
    importance: Tensor
    index: Tensor  # type: ignore[assignment]  # as the graph calls it; tuple.index is of no use here
    key_bias: Tensor | None = None


class VisionGraph(nn.Module):
    """Tower, merger and everything that happens to visual tokens before the language model; one image a call."""

    def __init__(self, visual: Any, shape: ModelShape, schedule: Schedule) -> None:
        super().__init__()
        self.visual = visual
        self.shape, self.schedule = shape.tower, schedule
        self.stages = {stage.layer: stage for stage in schedule.tower_stages}
        self.scoring_blocks = schedule.scoring_blocks(shape.tower)

    def uses_entropy(self) -> bool:
        """Whether any stage reads the patches' entropy."""
        ranked_by_attention = self.schedule.needs_importance or any(layer > 0 for layer in self.stages)
        return 0 in self.stages or (ranked_by_attention and self.schedule.importance.entropy_weight != 0)

    def uses_budget(self) -> bool:
        """Whether any stage of this graph counts tokens."""
        return bool(self.stages) or self.schedule.first_stage is not None

    def forward(self, pixel_values: Tensor, entropy: Tensor | None, budget_tokens: Tensor | None) -> Embedded:
        """Embed one image.

        Args:
            pixel_values: T [rows, columns, G, patch_dim], patches in merge order.
            entropy: float32 [rows, columns, G], bits; None where ``uses_entropy`` is false.
            budget_tokens: [N], only its length counts; None where ``uses_budget`` is false.
        """
        rows, columns = pixel_values.shape[:2]
        budget = budget_tokens.shape[0] if budget_tokens is not None else rows * columns
        state = self.begin(pixel_values, entropy, budget)
        state = self.run_blocks(state, 0, self.shape.blocks)
        return self.finish(state, self.merge(state))

    def begin(self, pixel_values: Tensor, entropy: Tensor | None, budget: int) -> TowerState:
        """The state before block 0."""
        rows, columns, group, _ = pixel_values.shape
        patches = pixel_values.reshape(rows * columns * group, self.shape.patch_dim)
        entropy = entropy.reshape(rows * columns * group) if entropy is not None else None
        embedding = self.visual.patch_embed.proj
        hidden = F.linear(patches, embedding.weight.reshape(self.shape.embed_dim, self.shape.patch_dim), embedding.bias)
        if hasattr(self.visual, "pos_embed"):
            hidden = hidden + self._learned_positions(rows, columns).to(hidden.dtype)
        cos, sin = self._rotary(rows, columns, hidden)
        if 0 in self.stages:
            importance = self.rank_pixels(pixel_values, entropy)
        else:
            importance = torch.zeros(rows * columns, dtype=torch.float32, device=hidden.device)
        index = torch.arange(rows * columns, device=hidden.device)
        state = TowerState(hidden, cos, sin, entropy, importance, index, rows, columns, budget)
        return replace(state, windows=self._windows(state))

    def run_blocks(self, state: TowerState, first: int, end: int) -> TowerState:
        """Blocks ``first`` to ``end`` − 1 with the stages before them."""
        for number in range(first, end):
            block = self.visual.blocks[number]
            stage = self.stages.get(number)
            if stage is not None:
                state = self._reduce(state, stage)
            if state.windows is not None and not self.shape.looks_everywhere(number):
                state = _behind(block, state, self._attention_in_windows(block, state.hidden, state.windows))
            else:
                mixed, query, key = self._attention(block, state)
                state = _behind(block, state, mixed)
                if number in self.scoring_blocks:
                    state = replace(state, query=query, key=key)
                    state = replace(state, importance=self.score(query, key, state))
            if number in self.shape.deepstack_blocks:
                merged = self.visual.deepstack_merger_list[self.shape.deepstack_blocks.index(number)](state.hidden)
                state = replace(state, deepstack=merged if state.deepstack is None else torch.cat([state.deepstack, merged], 1))
        return state

    def _reduce(self, state: TowerState, stage: Stage) -> TowerState:
        """A stage of the tower: a token's patches travel as one row, with what they have given to DeepStack behind."""
        patches = state.hidden.reshape(state.index.shape[0], self.shape.group * self.shape.embed_dim)
        left = self.compact(stage, state.row(patches), state)
        own = state.own(left.features)
        deepstack = left.features[:, own.shape[1] :] if state.deepstack is not None else None
        state = _survivors(state, own.reshape(-1, self.shape.embed_dim), deepstack, left, self.shape.group)
        return replace(state, windows=self._windows(state))

    def attend(self, number: int, state: TowerState) -> tuple[Tensor, Tensor]:
        """Queries and keys [heads, alive · G, head_dim] of block ``number``, which looks everywhere, for scoring apart from the walk."""
        _, query, key = self._attention(self.visual.blocks[number], state)
        return query, key

    def merge(self, state: TowerState) -> Tensor:
        """The merger: visual_embeds T [alive, H] of the tokens that the tower has left, with DeepStack's features behind."""
        merger = self.visual.merger
        if hasattr(merger, "ln_q"):
            merged = merger.mlp(_norm(merger.ln_q, state.hidden).reshape(state.index.shape[0], self.shape.group * self.shape.embed_dim))
        else:
            merged = merger(state.hidden)
        return state.row(merged)

    def finish(self, state: TowerState, visual_embeds: Tensor) -> Embedded:
        """First decoder stage, from ``merge``'s embeddings."""
        if self.schedule.first_stage is None:
            return Embedded(visual_embeds, state.importance, state.index, self._key_bias(state.size))
        left = self.compact(self.schedule.first_stage, visual_embeds, state, final=True)
        return Embedded(left.features, left.importance, state.index[left.kept], self._key_bias(left.size))

    def _key_bias(self, size: Tensor | None) -> Tensor | None:
        return None if size is None else self.schedule.proportional_attention * size.log()

    def _attention(self, block: Any, state: TowerState) -> tuple[Tensor, Tensor, Tensor]:
        """A block's attention over all patches alive: its output [P, C], and its queries and keys [heads, P, head_dim]."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        patches = state.hidden.shape[0]
        qkv = block.attn.qkv(_norm(block.norm1, state.hidden)).reshape(1, patches, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        query = rotary_embedding(qkv[0], state.cos[None], state.sin[None])  # [1, heads, P, head_dim]
        key = rotary_embedding(qkv[1], state.cos[None], state.sin[None])
        mixed = attention(query, key, qkv[2], scale=head_dim**-0.5)
        return block.attn.proj(mixed.transpose(1, 2).reshape(patches, self.shape.embed_dim)), query[0], key[0]

    def _attention_in_windows(self, block: Any, hidden: Tensor, windows: Windows) -> Tensor:
        """A block's attention of all patches [P, C] to those of their own window, all windows as one batch: [P, C]."""
        heads, head_dim, width, group = self.shape.heads, self.shape.head_dim, self.shape.embed_dim, self.shape.group
        count, room = windows.cos.shape[:2]
        placed = _put_tokens(block.attn.qkv(_norm(block.norm1, hidden)), windows.slot, count * room // group, group)
        qkv = placed.reshape(count, room, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key = (rotary_embedding(part, windows.cos, windows.sin) for part in (qkv[0], qkv[1]))  # [W, heads, R, head_dim]
        mixed = masked_attention(query, key, qkv[2], windows.mask, scale=head_dim**-0.5)
        tokens = mixed.transpose(1, 2).reshape(-1, group * width)[windows.slot]
        output: Tensor = block.attn.proj(tokens.reshape(-1, width))
        return output

    def _windows(self, state: TowerState) -> Windows | None:
        """Where the tokens alive lie in their windows, which no stage changes."""
        side, group = self.shape.window, self.shape.group
        if not side:
            return None
        row = torch.arange(state.rows, device=state.index.device)[:, None]
        column = torch.arange(state.columns, device=state.index.device)
        window = row // side * self.shape.windows(state.columns) + column // side  # [rows, columns]
        slot = ((window * side + row % side) * side + column % side).reshape(-1)[state.index]
        count = self.shape.windows(state.rows) * self.shape.windows(state.columns)
        cos, sin = (_put_tokens(table, slot, count * side**2, group).reshape(count, side**2 * group, -1) for table in (state.cos, state.sin))
        there = torch.ones_like(state.cos[:, :1])
        absent = (1 - _put_tokens(there, slot, count * side**2, group).reshape(count, 1, 1, side**2 * group)) * NOT_THERE
        return Windows(slot, cos, sin, absent.expand(-1, -1, side**2 * group, -1))

    def rank_pixels(self, pixel_values: Tensor, entropy: Tensor | None) -> Tensor:
        """Importance before block 0: float32 [N] from pixels T [rows, columns, G, patch_dim] and entropy float32 [P]."""
        return pixel_importance(pixel_values, entropy)

    def score(self, query: Tensor, key: Tensor, state: TowerState) -> Tensor:
        """Importance of the tokens alive: float32 [alive] from queries and keys [heads, alive · G, head_dim] of their patches."""
        settings = self.schedule.importance
        relevance = context_relevance(
            query,
            key,
            scale=self.shape.head_dim**-0.5,
            global_threshold=settings.global_threshold,
            score_rows=settings.score_rows,
            global_rows=settings.global_rows,
        )
        if state.entropy is not None:
            relevance = add_entropy(relevance, state.entropy, entropy_weight=settings.entropy_weight)
        return relevance.reshape(-1, self.shape.group).mean(1)

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        """One stage over the tokens alive.

        ``features`` [alive, F] are rows of G · C in the tower and of H after the merger (``final``), DeepStack's behind (``TowerState.own``).
        Exactly ⌈N·keep/1024⌉ tokens survive, in their order.
        """
        count, importance, size = keep_count(state.budget, stage.keep), state.importance, state.size
        if stage.cell is None:
            kept = keep_top(importance, count)
            features, survivor_importance, size = features[kept], importance[kept], size[kept] if size is not None else None
        else:
            cell, cells = _grid_cells(state.rows, state.columns, stage.cell, features.device)
            kept, slot, members = keep_top_per_cell(importance, cell[state.index], cells, count)
            groups = group_tokens(kept, slot, members)
            features, summed = merge_tokens(features, importance, kept, slot, members, *groups)
            survivor_importance = importance[kept]
            if size is not None:
                _, size = merge_tokens(size[:, None], size, kept, slot, members, *groups)  # the sum over each survivor's members
            elif self.schedule.proportional_attention:
                size = members.float()
            if final and self.schedule.recycled_importance == "sum":
                survivor_importance = torch.where(members > 1, summed, survivor_importance)
            elif final and self.schedule.recycled_importance == "protected":
                survivor_importance = torch.where(members > 1, PROTECTED, survivor_importance)
        return Compacted(features, survivor_importance, kept, size)

    def _learned_positions(self, rows: int, columns: int) -> Tensor:
        """Learned embedding of every patch's place, from the model's square table to the image's grid bilinearly: float32 [P, C], in merge order."""
        table, side, width = self.visual.pos_embed.weight, self.shape.merge_size, self.shape.embed_dim
        across = math.isqrt(table.shape[0])
        down = _between(table.float().reshape(across, across, width), rows * side)  # [rows · side, across, C]
        places = _between(down.transpose(0, 1), columns * side)  # [columns · side, rows · side, C]
        return places.reshape(columns, side, rows, side, width).permute(2, 0, 3, 1, 4).reshape(-1, width)

    def _rotary(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the two-dimensional rotary embedding, [P, head_dim/2] each, patches in merge order."""
        side, quarter = self.shape.merge_size, self.shape.head_dim // 4
        grid = rows, columns, side, side
        row = torch.arange(rows, device=like.device)[:, None, None, None] * side + torch.arange(side, device=like.device)[:, None]
        column = torch.arange(columns, device=like.device)[:, None, None] * side + torch.arange(side, device=like.device)
        place = torch.stack([row.expand(grid).reshape(-1), column.expand(grid).reshape(-1)], 1)  # [P, 2]
        steps = torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter
        angles = (place.float()[:, :, None] * TOWER_ROPE_THETA**-steps).reshape(-1, 2 * quarter)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def pixel_importance(pixel_values: Tensor, entropy: Tensor | None) -> Tensor:
    """Importance before any attention: spread of a token's normalised pixels plus its mean entropy as a share of 8 bits.

    pixel_values [rows, columns, G, patch_dim], entropy float32 [P] → float32 [N]. A blank area has neither.
    """
    rows, columns, group, patch_dim = pixel_values.shape
    pixels = pixel_values.float().reshape(rows * columns, group * patch_dim)
    centred = pixels - pixels.mean(1, keepdim=True)  # first: a difference of squares leaves a blank area a spread of 3e-4, and merging weighs by it
    spread = centred.square().mean(1).sqrt()
    if entropy is None:
        raise ValueError("a stage before tower block 0 needs the patches' entropy")
    return spread + entropy.reshape(-1, group).mean(1) / ENTROPY_BITS


def _behind(block: Any, state: TowerState, mixed: Tensor) -> TowerState:
    """The state behind a block whose attention has given ``mixed``."""
    hidden = state.hidden + mixed
    return replace(state, hidden=hidden + block.mlp(_norm(block.norm2, hidden)))


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """A layer norm as it is; a root-mean-square norm as the operator that engines fuse, not as its module spells it out."""
    if isinstance(norm, nn.LayerNorm):
        normed: Tensor = norm(hidden)
        return normed
    return rms_norm(hidden, norm.weight, epsilon=norm.variance_epsilon)


def _between(rows: Tensor, length: int) -> Tensor:
    """``length`` rows evenly spread from the first of ``rows`` to the last, each between its two neighbours: [K, L, C] → [length, L, C]."""
    place = torch.arange(length, device=rows.device).float()
    place = place * ((rows.shape[0] - 1) / place[-1:].clamp(min=1))
    before = place.long()
    share = (place - before)[:, None, None]
    return rows[before] * (1 - share) + rows[(before + 1).clamp(max=rows.shape[0] - 1)] * share


def _put_tokens(rows: Tensor, slot: Tensor, slots: int, group: int) -> Tensor:
    """Rows of tokens' patches [tokens · G, C] at the tokens' places among ``slots``, zeros elsewhere: [slots, G · C]."""
    wide = rows.reshape(-1, group * rows.shape[1])
    return wide.new_zeros(slots, wide.shape[1]).index_put((slot,), wide)


def _grid_cells(rows: int, columns: int, cell: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cell of every original token, int64 [N], and the cells 0 … C − 1, for square cells of ``cell``/1024 tokens."""
    across = cell_count(columns, cell)
    row = cell_of(torch.arange(rows, device=device), cell)
    column = cell_of(torch.arange(columns, device=device), cell)
    cells = torch.arange(cell_count(rows, cell) * across, device=device)
    return (row[:, None] * across + column).reshape(rows * columns), cells


def _survivors(state: TowerState, hidden: Tensor, deepstack: Tensor | None, left: Compacted, group: int) -> TowerState:
    """The state of the tokens that a stage has left, whose features have been gathered (and merged) already."""
    kept = left.kept
    return replace(
        state,
        hidden=hidden,
        deepstack=deepstack,
        importance=left.importance,
        size=left.size,
        index=state.index[kept],
        cos=_take_groups(state.cos, kept, group),
        sin=_take_groups(state.sin, kept, group),
        entropy=_take_groups(state.entropy, kept, group) if state.entropy is not None else None,
        query=None,
        key=None,
    )


def _take_groups(x: Tensor, kept: Tensor, group: int) -> Tensor:
    """Rows of the kept tokens' patches: [tokens · G, …] → [kept · G, …]."""
    grouped = x.reshape(-1, group * x[0].numel())
    return grouped[kept].reshape(-1, *x.shape[1:])
